"""
What happens inside a model while it writes: where attention goes, when the prediction is made, what branches add.

All models are made to write the same texts, so that their positions can be compared. Everything is read through hooks
and the outputs that transformers records; nothing of the model is changed.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from modeling_qwen3vl_pvm import pvm_blocks
from pvm.checkpoints.loading import Checkpoint
from pvm.data.encoding import ConversationCollator
from pvm.evaluation.ablations import read_images
from pvm.evaluation.metrics import draws, mean_interval
from pvm.evaluation.questions import Prompts, Question


PROBED_TOKENS = 512  # of a text, at most
CHUNK = 64  # tokens whose attention is looked at together: [layers, heads, chunk, context] is in memory at once
HEAT_MAP_TOKENS = 4  # a row, at most
LONG_TEXT = 32  # tokens; texts of at least so many are looked at by position


def choose_rows(questions: Sequence[Question], per_group: int) -> list[int]:
    """At most `per_group` rows of each group, spread evenly over those that have an image."""
    groups: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        if question.distance is not None:
            groups.setdefault(question.group, []).append(index)
    chosen = []
    for rows in groups.values():
        number = min(per_group, len(rows))
        chosen += [rows[k * len(rows) // number] for k in range(number)]
    return chosen


def chosen_tokens(depths: Sequence[int], length: int) -> list[int]:
    """At most `HEAT_MAP_TOKENS` of the scored pieces' first tokens that a text of `length` tokens has, evenly."""
    inside = [depth for depth in depths if depth < length] or [0]
    number = min(HEAT_MAP_TOKENS, len(inside))
    return [inside[k * len(inside) // number] for k in range(number)]


@torch.inference_mode()
def probe(checkpoint: Checkpoint, prompts: Prompts, index: int, text: str, depths: Sequence[int]) -> dict[str, Any]:
    """
    Let the model write `text` after a prompt with an image, and record what happens where it predicts its tokens.

    Args:
        index (`int`): of the prompt.
        depths (`Sequence[int]`): token offsets of the pieces that heat maps are wanted for.

    Returns:
        `dict`: by position in the text (`[position][layer]` lists) and by layer (`[layer]`, means over positions):

        - `visual_tokens`, and `text_tokens` `[position]`: how many of either the query could read;
        - `attention` `[position][layer]`: the share of self-attention on visual tokens, a mean over heads;
        - `kl` `[layer]`: nats from the final prediction to that of the layer's logit lens, KL(final || lens); the
          lens is the model's own last norm and head on the residual stream after the layer;
        - `residual`, `ffn` `[layer]`: root mean squares of the stream before the FFN, and of what the FFN adds;
        - `injected` `{layer: root mean square}`: of what the branch adds there;
        - `heat_maps`: for some tokens, the attention over the visual tokens of each branch, `branches` `{layer:
          [visual]}`, and of self-attention, `self_attention` `[visual]`, a mean over layers; means over heads, both
          of sum 1. Only if the prompt has one image, whose `grid` is `[rows, columns]` of visual tokens.
    """
    model, tokenizer = checkpoint.plain_model, checkpoint.processor.tokenizer
    decoder = model.model.language_model
    layers, blocks = decoder.layers, pvm_blocks(model)
    example = prompts[index]
    batch = ConversationCollator(tokenizer.pad_token_id)([example])
    written = tokenizer(text, add_special_tokens=False)["input_ids"][:PROBED_TOKENS]
    batch = _append(batch, written[:-1])
    batch = {key: value.to(model.device) for key, value in batch.items()}
    length = max(len(written), 1)
    visual = batch["mm_token_type_ids"][0] > 0

    cache, positions = read_images(model, batch, length)
    record: dict[str, list[torch.Tensor]] = {"residual": [], "ffn": [], "injected": [], "branches": []}
    attention, over_image, kl = [], [], []
    implementation = model.config._attn_implementation
    with ExitStack() as stack:
        for layer in layers:
            hook = layer.post_attention_layernorm.register_forward_pre_hook(_keep_input(record["residual"]))
            stack.callback(hook.remove)
            stack.callback(layer.mlp.register_forward_hook(_keep_output(record["ffn"])).remove)
        for block in blocks.values():
            stack.callback(block.register_forward_hook(_keep_output(record["injected"])).remove)
            stack.callback(block.cross_attn.register_forward_hook(_keep_weights(record["branches"])).remove)
        model.set_attn_implementation("eager")  # which alone tells its weights
        stack.callback(model.set_attn_implementation, implementation)
        start = batch["input_ids"].shape[1] - length
        for first in range(start, start + length, CHUNK):
            end = min(first + CHUNK, start + length)
            output = model.model(
                input_ids=batch["input_ids"][:, first:end],
                attention_mask=batch["attention_mask"][:, :end],
                position_ids=positions[..., first:end],
                past_key_values=cache,
                output_attentions=True,
                output_hidden_states=True,
            )
            weights = torch.stack([layer[0].float().mean(dim=0) for layer in output.attentions], dim=1)
            to_image = weights[..., visual[:end]]  # [position, layer, visual]
            attention.append(to_image.sum(dim=-1).cpu())
            over_image.append(to_image.mean(dim=1).cpu())
            kl.append(_logit_lens(model, output).cpu())

    counted = torch.arange(start, start + length) + 1 - int(visual.sum())
    number = len(blocks)
    result = {
        "visual_tokens": int(visual.sum()),
        "text_tokens": counted.tolist(),
        "attention": _rounded(torch.cat(attention)),
        "kl": _rounded(torch.cat(kl).mean(dim=0)),
        "residual": _by_layer(record["residual"], len(layers)),
        "ffn": _by_layer(record["ffn"], len(layers)),
        "injected": dict(zip(map(str, blocks), _by_layer(record["injected"], number))) if number else {},
        "heat_maps": [],
    }
    grid = batch.get("image_grid_thw")
    if grid is not None and len(grid) == 1 and int(grid[0, 0]) == 1:
        merge = model.config.vision_config.spatial_merge_size
        result["grid"] = (grid[0, 1:] // merge).tolist()
        branches = {
            str(layer): torch.cat(record["branches"][k::number])
            for k, layer in enumerate(blocks)
            if record["branches"]  # which the control has not
        }
        for token in chosen_tokens(depths, length):
            seen = torch.cat(over_image)[token]
            result["heat_maps"].append(
                {
                    "token": token,
                    "text": tokenizer.decode(written[token : token + 1]).strip(),
                    "branches": {layer: _rounded(weights[token]) for layer, weights in branches.items()},
                    "self_attention": _rounded(seen / seen.sum()),
                }
            )
    return result


def _append(batch: dict[str, torch.Tensor], tokens: Sequence[int]) -> dict[str, torch.Tensor]:
    """A batch of one row with further text tokens."""
    more = torch.tensor([list(tokens)], dtype=torch.long)
    added = {
        "input_ids": more,
        "attention_mask": torch.ones_like(more),
        "mm_token_type_ids": torch.zeros_like(more),
    }
    return {**batch, **{key: torch.cat([batch[key], new.to(batch[key].dtype)], dim=1) for key, new in added.items()}}


def _keep_input(kept: list[torch.Tensor]):
    def hook(module, inputs):
        kept.append(inputs[0][0].float().pow(2).mean(dim=-1).sqrt().cpu())

    return hook


def _keep_output(kept: list[torch.Tensor]):
    def hook(module, inputs, output):
        kept.append(output[0].float().pow(2).mean(dim=-1).sqrt().cpu())

    return hook


def _keep_weights(kept: list[torch.Tensor]):
    def hook(module, inputs, output):
        if output[1] is not None:  # the control's branches attend to nothing
            kept.append(output[1][0].float().mean(dim=0).cpu())

    return hook


def _by_layer(kept: list[torch.Tensor], number: int) -> list[float]:
    """Means over positions of what `number` modules have left, one after the other in each chunk."""
    return _rounded(torch.stack([torch.cat(kept[k::number]).mean() for k in range(number)]))


def _logit_lens(model: torch.nn.Module, output: Any) -> torch.Tensor:
    """`[position, layers - 1]`: KL(final || lens) in nats."""
    decoder = model.model.language_model
    final = model.lm_head(output.last_hidden_state[0]).float().log_softmax(dim=-1)
    kl = []
    for states in output.hidden_states[1:-1]:
        lens = model.lm_head(decoder.norm(states[0])).float().log_softmax(dim=-1)
        kl.append((final.exp() * (final - lens)).sum(dim=-1))
    return torch.stack(kl, dim=1)


def _rounded(values: torch.Tensor) -> Any:
    """Lists of numbers with five digits: they go into files."""
    if values.ndim == 0:
        return float(f"{values.item():.5g}")
    return [_rounded(value) for value in values]


def summarise(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """
    What the report says of probes.

    Args:
        results (`dict` `{model: results}`): of [`probe`], of the same rows for all models, with their `group`.

    Returns:
        `dict` by model: `attention` by group of rows, with `by_position` (texts of at least `LONG_TEXT` tokens),
        `by_ratio` (text tokens per visual token), both in bins that double, `by_layer` and `decay` (see
        [`fit_decay`]); over all rows `kl` by layer, last one excluded; `residual`, `ffn`, `injected` by layer. Entries
        have `n` rows, `mean` and a 95 % `interval`.
    """
    return {
        name: {
            "rows": len(rows),
            # Groups apart: where rows of one end those of another go on, and a curve through both is of neither.
            "attention": {
                group: _summarise_attention([row for row in rows if row["group"] == group])
                for group in dict.fromkeys(row["group"] for row in rows)
            },
            "kl": _over_rows([row["kl"] for row in rows]),
            "residual": _over_rows([row["residual"] for row in rows]),
            "ffn": _over_rows([row["ffn"] for row in rows]),
            "injected": {
                str(layer): mean_interval([row["injected"][layer] for row in rows]) for layer in rows[0]["injected"]
            },
        }
        for name, rows in results.items()
    }


def _over_rows(values: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    return [mean_interval(column) for column in zip(*values)]


def _summarise_attention(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    by_position: dict[int, list[tuple[float, float]]] = {}
    by_ratio: dict[int, list[tuple[float, float]]] = {}
    points = []
    for row in rows:
        shares = [sum(layers) / len(layers) for layers in row["attention"]]
        ratios = [text / row["visual_tokens"] for text in row["text_tokens"]]
        mine = _binned([math.floor(math.log2(ratio)) if ratio else 0 for ratio in ratios], ratios, shares)
        points.append(list(mine.values()))
        for key, point in mine.items():
            by_ratio.setdefault(key, []).append(point)
        if len(shares) >= LONG_TEXT:
            positions = range(1, len(shares) + 1)
            for key, point in _binned([k.bit_length() - 1 for k in positions], positions, shares).items():
                by_position.setdefault(key, []).append(point)
    return {
        "rows": len(rows),
        "by_position": _bins(by_position),
        "by_ratio": _bins(by_ratio),
        "by_layer": _over_rows([[sum(layer) / len(layer) for layer in zip(*row["attention"])] for row in rows]),
        "decay": fit_decay(points),
    }


def _binned(keys: Sequence[int], x: Sequence[float], y: Sequence[float]) -> dict[int, tuple[float, float]]:
    """Means of `x` and `y` by key."""
    members: dict[int, list[int]] = {}
    for k, key in enumerate(keys):
        members.setdefault(key, []).append(k)
    return {
        key: (sum(x[k] for k in inside) / len(inside), sum(y[k] for k in inside) / len(inside))
        for key, inside in members.items()
    }


def _bins(points: dict[int, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    return [
        {"x": sum(x for x, _ in inside) / len(inside), **mean_interval([y for _, y in inside])}
        for _, inside in sorted(points.items())
    ]


def fit_decay(rows: Sequence[Sequence[tuple[float, float]]]) -> dict[str, Any] | None:
    """
    How the share of attention on the image falls: `share = 1 / (1 + (x / half) ** exponent)`, where x is the number of
    text tokens per visual token. The paper's bound (Omega <= beta / (beta + mu t)) is this with the exponent 1; equal
    attention to every token is `half = exponent = 1`.

    Args:
        rows: for each row its points (x, share).

    Returns:
        `dict`: `exponent` and `half` (the x at which half of the attention is on the image) by least squares on
        log-odds against log x, with the `interval`s of 95 % of resamples of rows, `r2`, and the least and the largest
        x, `observed`; `None` if x does not vary.
    """
    kept = [[(x, share) for x, share in row if x > 0 and 0 < share < 1] for row in rows]
    # By row: the sums that a regression of log-odds on log x is made of, [rows, 6].
    logs = [[(math.log(x), math.log(share / (1 - share))) for x, share in row] for row in kept if row]
    sums = np.array([np.sum([[1, u, u * u, v, u * v, v * v] for u, v in row], axis=0) for row in logs])
    observed = [x for row in kept for x, _ in row]
    if len(sums) == 0 or np.ptp(observed) < 1:
        return None

    def solve(total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n, u, uu, v, uv, _ = total.T
        spread = n * uu - u * u
        with np.errstate(divide="ignore", invalid="ignore"):  # resamples that hold a single x
            slope = (n * uv - u * v) / spread
            return -slope, np.exp((v - slope * u) / n / -slope)

    exponent, half = solve(sums.sum(axis=0)[None])
    drawn = [values[np.isfinite(values)] for values in solve(draws(len(sums), stream=0) @ sums)]
    n, u, uu, v, uv, vv = sums.sum(axis=0)
    return {
        "r2": float((n * uv - u * v) ** 2 / ((n * uu - u * u) * (n * vv - v * v))),
        "exponent": float(exponent[0]),
        "exponent_interval": np.quantile(drawn[0], [0.025, 0.975]).tolist(),
        "half": float(half[0]),
        "half_interval": np.quantile(drawn[1], [0.025, 0.975]).tolist(),
        "observed": [min(observed), max(observed)],
    }
