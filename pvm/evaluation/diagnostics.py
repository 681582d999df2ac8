"""
What happens inside a model while it writes: where attention goes, at which layer the prediction is made, and what
branches add.

All models are made to write the same texts, so that positions are comparable. Values are recorded with forward hooks
and transformers' own outputs; the model is not changed.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from block_qwen3vl_pvm import Qwen3VLPVMCrossAttention
from eviction_qwen3vl_pvm import CachedTokens
from modeling_qwen3vl_pvm import pvm_blocks
from pvm.checkpoints.loading import Checkpoint
from pvm.data.encoding import ConversationCollator
from pvm.evaluation.ablations import process_images
from pvm.evaluation.bootstrap import ROWS, central_95, counts, mean_interval
from pvm.evaluation.questions import Prompts, Question


MAX_TOKENS = 512  # of a text
CHUNK = 64  # tokens per forward pass: attention weights [layers, heads, chunk, context] are in memory at once
HEAT_MAP_TOKENS = 4  # of a text, at most
LONG_TEXT = 32  # tokens from which attention is reported by position


def choose_rows(questions: Sequence[Question], per_group: int) -> list[int]:
    """At most `per_group` rows with an image from each group, spread evenly."""
    groups: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        if question.distance is not None:
            groups.setdefault(question.group, []).append(index)
    return [row for rows in groups.values() for row in _spread(rows, per_group)]


def choose_tokens(depths: Sequence[int], length: int) -> list[int]:
    """The tokens with heat maps: some of the `depths` in a text of `length` tokens, or its first token."""
    return _spread([depth for depth in depths if depth < length] or [0], HEAT_MAP_TOKENS)


def _spread(values: Sequence[int], most: int) -> list[int]:
    number = min(most, len(values))
    return [values[k * len(values) // number] for k in range(number)]


@torch.inference_mode()
def diagnose(checkpoint: Checkpoint, prompts: Prompts, index: int, text: str, depths: Sequence[int]) -> dict[str, Any]:
    """
    Make the model write `text` after a prompt with an image, and record what happens where it predicts each token.

    Args:
        index (`int`): of the prompt.
        depths (`Sequence[int]`): token offsets of the pieces to draw heat maps for.

    Returns:
        `dict`: by position in the text (`[position]`) or by layer (`[layer]`, means over positions):

        - `visual_tokens`, and `text_tokens` `[position]`: how many of each the query can attend to;
        - `attention` `[position][layer]`: the share of self-attention on visual tokens, a mean over heads;
        - `kl` `[layer]`: KL(final || lens) in nats, from the final prediction to that of the logit lens: the model's
          own last norm and head applied to the residual stream after the layer;
        - `residual`, `ffn` `[layer]`: root mean squares of the stream before the FFN, and of the FFN's output;
        - `injected` `{layer: root mean square}`: of what the branch adds;
        - `heat_maps`: for some tokens the attention over visual tokens, means over heads with sum 1: of each branch,
          `branches` `{layer: [visual]}`, and of self-attention, `self_attention` `[visual]`, also a mean over layers.
          Only for prompts with one image, whose `grid` of visual tokens is `[rows, columns]`.
    """
    model, tokenizer = checkpoint.plain_model, checkpoint.processor.tokenizer
    layers, blocks = model.model.language_model.layers, pvm_blocks(model)
    batch = ConversationCollator(tokenizer.pad_token_id)([prompts[index]])
    written = tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_TOKENS]
    batch = _append(batch, written[:-1])
    batch = {key: value.to(model.device) for key, value in batch.items()}
    length = max(len(written), 1)
    visual = batch["mm_token_type_ids"][0] > 0

    cache, positions = process_images(model, batch, length)
    # By layer, the values of each chunk.
    recorded: dict[str, dict[int, list[torch.Tensor]]] = {"residual": {}, "ffn": {}, "injected": {}, "branches": {}}
    attention, over_image, kl = [], [], []
    implementation = model.config._attn_implementation
    with ExitStack() as stack:
        for k, layer in enumerate(layers):
            hook = layer.post_attention_layernorm.register_forward_pre_hook(_record_input(recorded["residual"], k))
            stack.callback(hook.remove)
            stack.callback(layer.mlp.register_forward_hook(_record_output(recorded["ffn"], k)).remove)
        for k, block in blocks.items():
            stack.callback(block.register_forward_hook(_record_output(recorded["injected"], k)).remove)
        model.set_attn_implementation("eager")  # the others return no attention weights
        stack.callback(model.set_attn_implementation, implementation)
        start = batch["input_ids"].shape[1] - length
        for first in range(start, start + length, CHUNK):
            end = min(first + CHUNK, start + length)
            output, to_image, of_branches = forward_with_attention(
                model,
                visual,
                cache,
                input_ids=batch["input_ids"][:, first:end],
                attention_mask=batch["attention_mask"][:, :end],
                position_ids=positions[..., first:end],
                output_hidden_states=True,
            )
            attention.append(to_image.sum(dim=-1))
            over_image.append(to_image.mean(dim=1))
            for k, weights in of_branches.items():
                recorded["branches"].setdefault(k, []).append(weights)
            kl.append(_logit_lens(model, output).cpu())

    sizes = {
        what: {k: torch.cat(values).mean().item() for k, values in recorded[what].items()}
        for what in ("residual", "ffn", "injected")
    }
    text_tokens = torch.arange(start, start + length) + 1 - int(visual.sum())
    result = {
        "visual_tokens": int(visual.sum()),
        "text_tokens": text_tokens.tolist(),
        "attention": _rounded(torch.cat(attention)),
        "kl": _rounded(torch.cat(kl).mean(dim=0)),
        "residual": [_round(sizes["residual"][k]) for k in range(len(layers))],
        "ffn": [_round(sizes["ffn"][k]) for k in range(len(layers))],
        "injected": {str(k): _round(sizes["injected"][k]) for k in blocks},
        "heat_maps": [],
    }
    grid = batch.get("image_grid_thw")
    if grid is not None and len(grid) == 1 and int(grid[0, 0]) == 1:
        merge = model.config.vision_config.spatial_merge_size
        result["grid"] = (grid[0, 1:] // merge).tolist()
        branches = {str(k): torch.cat(values) for k, values in recorded["branches"].items()}
        for token in choose_tokens(depths, length):
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


def forward_with_attention(
    model: PreTrainedModel, visual: torch.BoolTensor, cache: Cache, **inputs: Any
) -> tuple[ModelOutput, torch.Tensor, dict[int, torch.Tensor]]:
    """
    A pass of the backbone over text of one row, and what of the image it attends to. The model has eager attention:
    the others return no weights.

    Args:
        visual (`torch.BoolTensor` `[sequence]`): where visual tokens are, at least of all before this pass.
        cache (`Cache`): that has seen the image, and may hold it no more.
        inputs: arguments of the backbone.

    Returns:
        The output; the weights of self-attention on those visual tokens that the cache holds, `[position, layer,
        visual]`, and those of each branch `{layer: [position, visual]}`. Both are means over heads, on the CPU.
    """
    branches: dict[int, torch.Tensor] = {}
    with ExitStack() as stack:
        for k, block in pvm_blocks(model).items():
            for module in block.modules():
                if isinstance(module, Qwen3VLPVMCrossAttention):
                    stack.callback(module.register_forward_hook(_record_weights(branches, k)).remove)
        output = model.model(**inputs, past_key_values=cache, output_attentions=True)
    cached, length = CachedTokens.of(cache), cache.get_seq_length()
    visual = torch.nn.functional.pad(visual.cpu(), (0, max(length - len(visual), 0)))[:length]
    if cached is not None:
        visual = visual[cached.until(length)[0].cpu()]
    to_image = [layer[0].float().mean(dim=0)[:, visual].cpu() for layer in output.attentions]
    return output, torch.stack(to_image, dim=1), branches


def _append(batch: dict[str, torch.Tensor], tokens: Sequence[int]) -> dict[str, torch.Tensor]:
    """A batch of one row with text tokens appended."""
    more = torch.tensor([list(tokens)], dtype=torch.long)
    added = {
        "input_ids": more,
        "attention_mask": torch.ones_like(more),
        "mm_token_type_ids": torch.zeros_like(more),
    }
    return {**batch, **{key: torch.cat([batch[key], new.to(batch[key].dtype)], dim=1) for key, new in added.items()}}


def _record_input(recorded: dict[int, list[torch.Tensor]], layer: int) -> Callable:
    def hook(module, inputs):
        recorded.setdefault(layer, []).append(_root_mean_square(inputs[0]))

    return hook


def _record_output(recorded: dict[int, list[torch.Tensor]], layer: int) -> Callable:
    def hook(module, inputs, output):
        recorded.setdefault(layer, []).append(_root_mean_square(output))

    return hook


def _record_weights(recorded: dict[int, torch.Tensor], layer: int) -> Callable:
    def hook(module, inputs, output):
        recorded[layer] = output[1][0].float().mean(dim=0).cpu()

    return hook


def _root_mean_square(states: torch.Tensor) -> torch.Tensor:
    """`[position]`, of the first row."""
    return states[0].float().pow(2).mean(dim=-1).sqrt().cpu()


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
    """Lists of numbers with five digits, to save space in files."""
    return _round(values.item()) if values.ndim == 0 else [_rounded(value) for value in values]


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def summarise(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """
    The diagnostics of a report.

    Args:
        results (`dict` `{model: results}`): of [`diagnose`] on the same rows for all models, each with its `group`.

    Returns:
        `dict` by model: `attention` by group of rows, with `by_position` (texts of at least `LONG_TEXT` tokens) and
        `by_ratio` (text tokens per visual token), both in bins of doubling width, `by_layer`, and `decay` (see
        [`fit_decay`]); over all rows `kl` by layer without the last one, and `residual`, `ffn`, `injected` by layer.
        Entries have `n` rows, `mean` and a 95 % `interval`.
    """
    return {
        name: {
            "rows": len(rows),
            # Groups may cover different ranges of the ratio, so one curve through all would describe none of them.
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
        binned = _binned([math.floor(math.log2(ratio)) if ratio else 0 for ratio in ratios], ratios, shares)
        points.append(list(binned.values()))
        for key, point in binned.items():
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
    Fit the decay of attention to the image: `share = 1 / (1 + (x / half) ** exponent)`, where x is the number of text
    tokens per visual token. The paper's bound (Omega <= beta / (beta + mu t)) has the exponent 1; equal attention to
    all tokens is `half = exponent = 1`.

    Args:
        rows: for each row its points (x, share).

    Returns:
        `dict`: `exponent` and `half` (the x at which half of the attention is on the image) by least squares on
        log-odds against log x, with bootstrap intervals, `r2`, and the smallest and largest x, `observed`; `None` if x
        does not vary.
    """
    kept = [[(x, share) for x, share in row if x > 0 and 0 < share < 1] for row in rows]
    # The sums of each row from which the regression of log-odds on log x is computed, [rows, 6].
    logs = [[(math.log(x), math.log(share / (1 - share))) for x, share in row] for row in kept if row]
    sums = np.array([np.sum([[1, u, u * u, v, u * v, v * v] for u, v in row], axis=0) for row in logs])
    observed = [x for row in kept for x, _ in row]
    if len(sums) == 0 or np.ptp(observed) < 1:
        return None

    def solve(total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n, u, uu, v, uv, _ = total.T
        spread = n * uu - u * u
        with np.errstate(divide="ignore", invalid="ignore"):  # resamples with a single x
            slope = (n * uv - u * v) / spread
            return -slope, np.exp((v - slope * u) / n / -slope)

    exponent, half = solve(sums.sum(axis=0)[None])
    drawn = [values[np.isfinite(values)] for values in solve(counts(len(sums), ROWS) @ sums)]
    n, u, uu, v, uv, vv = sums.sum(axis=0)
    return {
        "r2": float((n * uv - u * v) ** 2 / ((n * uu - u * u) * (n * vv - v * v))),
        "exponent": float(exponent[0]),
        "exponent_interval": central_95(drawn[0]),
        "half": float(half[0]),
        "half_interval": central_95(drawn[1]),
        "observed": [min(observed), max(observed)],
    }
