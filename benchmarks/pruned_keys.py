"""
A memory, or fewer keys of the image in the cache? Accuracy against bytes: branches whose image leaves the cache
(`image_kv_cache`) beside models whose visual keys are pruned without training, by a simple rule in VL-Cache's spirit.

    python -m benchmarks.pruned_keys --models assets/digits-backbone runs/digits_lora runs/digits_pvm \\
        --names base LoRA PVM

Pruning: when the first prompt has been read, each layer keeps the visual tokens to which the text after the image paid
most attention. Then two things are asked of what is left, on unseen pictures: to list all cells, and, after a first
question, another cell. Bytes are those of the image: visual keys and values in the cache, and the branches' memory.
Draws `--picture`.
"""

import argparse
import re
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import DynamicCache

from benchmarks.common import print_table
from cache_qwen3vl_pvm import get_visual_memory
from pvm.checkpoints.loading import Checkpoint, load_checkpoint
from pvm.style import COLOURS
from pvm.worlds import conversations
from pvm.worlds.data import WORLDS


SHARES = (1.0, 0.5, 0.25, 0.10, 0.05, 0.01)  # of visual keys; at least one is kept


def plain_messages(row: dict) -> list[dict]:
    """Messages without the empty texts that a table of images needs. (`to_conversation` takes files, not images.)"""
    parts = [[{k: v for k, v in part.items() if v} for part in message["content"]] for message in row["messages"]]
    return [{"role": message["role"], "content": content} for message, content in zip(row["messages"], parts)]


def encode(checkpoint: Checkpoint, row: dict) -> tuple[dict, torch.Tensor, int]:
    """The conversation to its last question, its rotary positions `[3, 1, tokens]`, the length of the first prompt."""
    messages, processor = plain_messages(row), checkpoint.processor
    texts = [processor.apply_chat_template(some, add_generation_prompt=True) for some in (messages[:-1], messages[:1])]
    inputs, first = (processor(text=[text], images=row["images"], return_tensors="pt") for text in texts)
    types = inputs["mm_token_type_ids"]
    inner = checkpoint.plain_model.model
    positions, _ = inner.get_rope_index(inputs["input_ids"], types, image_grid_thw=inputs["image_grid_thw"])
    return inputs, positions, first["input_ids"].shape[1]


def prune(cache: DynamicCache, attentions: tuple[torch.Tensor, ...], is_visual: torch.Tensor, kept: int) -> None:
    """Keep `kept` visual columns in each layer: those with most attention `[1, heads, query, key]` of later text."""
    visual, others = is_visual.nonzero()[:, 0], (~is_visual).nonzero()[:, 0]
    for layer, weights in zip(cache.layers, attentions):
        scores = weights[0, :, visual[-1] + 1 :, visual].mean(dim=(0, 1))
        columns = torch.cat([others, visual[scores.topk(kept).indices]]).sort().values
        layer.keys, layer.values = layer.keys[:, :, columns], layer.values[:, :, columns]


def image_bytes(cache: DynamicCache, text_tokens: int) -> int:
    """Of visual keys and values in a cache that also holds `text_tokens`, and of the memory that rides with it."""
    memory = get_visual_memory(cache)
    states = [] if memory is None else [*memory.keys.values(), *memory.values.values()]
    for layer in cache.layers:
        states += [layer.keys[:, :, text_tokens:], layer.values[:, :, text_tokens:]]
    return sum(state.numel() * state.element_size() for state in states)


@torch.no_grad()
def answer(checkpoint: Checkpoint, row: dict, kept: int | None, image_kv_cache: str, longest: int) -> tuple[str, int]:
    """The greedy answer to the last question, and the bytes of the image, of which `kept` keys stay (`None`: all)."""
    model, tokenizer = checkpoint.plain_model, checkpoint.processor.tokenizer
    inputs, positions, first = encode(checkpoint, row)
    inputs, positions = inputs.to(model.device), positions.to(model.device)
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    options = {"output_attentions": True} if kept is not None else {"image_kv_cache": image_kv_cache}
    cache = DynamicCache(config=model.config.text_config)
    output = model(
        input_ids=ids[:, :first],
        position_ids=positions[..., :first],
        mm_token_type_ids=types[:, :first],
        pixel_values=inputs["pixel_values"],
        image_grid_thw=inputs["image_grid_thw"],
        past_key_values=cache,
        **options,
    )
    if kept is not None:
        prune(cache, output.attentions, types[0, :first] > 0, kept)
    size = image_bytes(cache, int((types[0, :first] == 0).sum()))
    later, position = ids[:, first:], positions[..., first:]
    if later.shape[1]:
        output = model(input_ids=later, position_ids=position, past_key_values=cache)
    tokens, position = [], positions[..., -1:]
    while len(tokens) < longest:
        tokens.append(int(output.logits[0, -1].argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
        position = position + 1
        output = model(input_ids=ids.new_tensor([[tokens[-1]]]), position_ids=position, past_key_values=cache)
    return tokenizer.decode(tokens, skip_special_tokens=True).strip(), size


def cells_of(answer: str) -> list[str]:
    """A list by cells, each with its name; an answer about one cell as it is."""
    if not answer.startswith("Cells "):
        return [answer]
    names = "|".join(conversations.NAMES)
    return re.findall(rf"(?:{names}).*?(?=(?: (?:{names}))|$)", answer)


def accuracy(checkpoint: Checkpoint, rows: list[dict], kept: int | None, image_kv_cache: str) -> list[float]:
    """Mean share of right cells in `list` rows and in `cell` rows, and mean bytes of the image."""
    right, sizes = {"list": [], "cell": []}, []
    for row in rows:
        text = row["messages"][-1]["content"][0]["text"]
        found, size = answer(checkpoint, row, kept, image_kv_cache, 2 * len(text.split()) + 40)
        expected, given = cells_of(text), cells_of(found)
        right[row["task"]].append(np.mean([a == b for a, b in zip_longest(expected, given[: len(expected)])]))
        sizes.append(size)
    return [np.mean(right["list"]), np.mean(right["cell"]), np.mean(sizes)]


def draw(results: dict[str, list[list[float]]], path: Path) -> None:
    """Both accuracies by bytes of the image, a line for each model."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for number, axis, title in zip((0, 1), axes, ("all cells listed", "another question")):
        for colour, (name, points) in zip(COLOURS, results.items()):
            values = np.array(points)
            axis.plot(values[:, 2], 100 * values[:, number], "o-", color=colour, label=name)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}")
        axis.set(title=title, xlabel="KiB of the image", ylim=(-3, 103))
    axes[0].set_ylabel("right (%)")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", required=True, nargs="+", help="checkpoints; pruned if they have no branches")
    parser.add_argument("--names", nargs="+", help="in the table and the picture (default: the checkpoints)")
    parser.add_argument("--world", choices=sorted(WORLDS), default="digits")
    parser.add_argument("--filler", type=int, default=64, help="tokens of text between image and question")
    parser.add_argument("--rows", type=int, default=60, help="of each kind")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    world, rng = WORLDS[args.world].load("test"), np.random.default_rng(15)
    cells = conversations.CELLS
    rows = [
        row
        for _ in range(args.rows)
        for row in (
            conversations.list_row(world, args.filler, cells[0], cells[-1], rng),
            conversations.cell_row(world, args.filler, 2, rng),
        )
    ]
    results, table = {}, []
    for path, name in zip(args.models, args.names or args.models, strict=True):
        checkpoint = load_checkpoint(path)
        if checkpoint.description.gates:
            settings = {mode: (None, mode) for mode in ("keep", "evict", "skip")}
            line = f"{name}: keep, evict, skip"
        else:
            checkpoint.plain_model.set_attn_implementation("eager")  # which returns attention
            visual = int((encode(checkpoint, rows[0])[0]["mm_token_type_ids"] > 0).sum())
            numbers = dict.fromkeys(max(round(share * visual), 1) for share in SHARES)
            settings = {f"{kept} of {visual} visual keys": (kept, "keep") for kept in numbers}
            line = f"{name}, pruned"
        results[line] = [accuracy(checkpoint, rows, *setting) for setting in tqdm(settings.values(), desc=name)]
        table += [[f"{name}, {setting}", *point] for setting, point in zip(settings, results[line])]
    texts = [[name, f"{some:.1%}", f"{one:.1%}", f"{size:,.0f}"] for name, some, one, size in table]
    print_table(
        f"{args.rows} conversations of each kind, {args.filler} tokens of text after the image",
        ["", "all cells listed", "another question", "bytes of the image"],
        texts,
    )
    if args.picture:
        draw(results, args.picture)


if __name__ == "__main__":
    main()
