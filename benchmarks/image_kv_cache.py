"""
What is saved when images are not in the KV cache (`image_kv_cache`), as ratios to the stock model in the same run.

    OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python -m benchmarks.image_kv_cache
    python -m benchmarks.image_kv_cache --shape 8B --device cuda --dtype bfloat16

A decode step and its cache, after an image of `--visual_tokens` and 64 tokens of text: stock, with the image in the
cache, and with branches, "evict" or "skip", whose caches are the same. Random states, as in benchmarks/decode.py. The
prompt, without the vision tower: the stock decoder, and the decoder with branches that skips the image. Runs of the
two models are interleaved. Prints medians, and quartiles of the ratios of neighbouring runs. `--picture` draws tokens
per second, and the largest batch whose cache fits into `--gigabytes`, computed from its bytes.
"""

import statistics

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm
from transformers import DynamicCache

from benchmarks.common import (
    build,
    interleaved,
    milliseconds,
    parser,
    print_environment,
    print_table,
    row_of_ratios,
)
from benchmarks.decode import PROMPT_TOKENS, WARM_UP, filled_cache
from cache_qwen3vl_pvm import VisualMemory, set_visual_memory
from eviction_qwen3vl_pvm import CachedTokens
from pvm.style import BLUE, VERMILLION


@torch.no_grad()
def decode(stock, branched, batch_size: int, visual_tokens: int, steps: int) -> tuple[list, list[int]]:
    """Milliseconds of `steps` pairs of decode steps, and the bytes of both caches."""
    config = branched.config.text_config
    options = {"device": branched.device, "dtype": branched.dtype}
    length = visual_tokens + PROMPT_TOKENS
    states = torch.randn(batch_size, config.num_key_value_heads, length, config.head_dim, **options)
    text_states = states[:, :, visual_tokens:].clone()
    memory_states = torch.randn(batch_size, config.pvm_num_key_value_heads, visual_tokens, config.head_dim, **options)
    positions = torch.arange(length, device=branched.device).expand(batch_size, -1)
    places = positions[:, :visual_tokens].int()
    keys, values = (dict.fromkeys(config.pvm_layers, states) for states in (memory_states, memory_states.clone()))
    memory = VisualMemory(places, torch.zeros_like(places), True, keys, values, in_kv_cache=False)
    step = {
        "input_ids": torch.full((batch_size, 1), 9, device=branched.device),
        "position_ids": torch.full((3, batch_size, 1), length, device=branched.device),
    }
    layers = config.num_hidden_layers

    def run(name: str) -> float:
        cache = filled_cache(states if name == "stock" else text_states, layers)
        if name == "branched":
            CachedTokens(positions[:, visual_tokens:], length).set(cache)
            set_visual_memory(cache, memory)
        model = stock if name == "stock" else branched
        return milliseconds(lambda: model(**step, past_key_values=cache), branched.device.type)

    sizes = [2 * layers * states.nbytes, 2 * (layers * text_states.nbytes + len(keys) * memory_states.nbytes)]
    return interleaved(run, WARM_UP, steps), sizes


@torch.no_grad()
def prompt(stock, branched, visual_tokens: int, runs: int) -> list[tuple[float, float]]:
    """Milliseconds of the decoder over an image and text: stock, and with branches that skip the image."""
    length, device = visual_tokens + PROMPT_TOKENS, branched.device
    size = branched.config.text_config.hidden_size
    inputs = {
        "inputs_embeds": torch.randn(1, length, size, device=device, dtype=branched.dtype),
        "position_ids": torch.arange(length, device=device).expand(3, 1, -1),
    }
    places = (torch.arange(length, device=device) < visual_tokens)[None]

    def run(name: str) -> float:
        cache = DynamicCache(config=branched.config)
        if name == "stock":
            return milliseconds(lambda: stock.model.language_model(**inputs, past_key_values=cache), device.type)
        decoder, more = branched.model.language_model, {"visual_pos_masks": places, "image_kv_cache": "skip"}
        return milliseconds(lambda: decoder(**inputs, **more, past_key_values=cache), device.type)

    return interleaved(run, 1, runs)


def draw(file: str, measured: dict[int, dict[int, tuple]], gigabytes: float) -> None:
    """Left tokens per second, right the largest batch, by visual tokens."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for batch_size, marker in zip(measured, "os^D"):
        visual = list(measured[batch_size])
        for k, (name, colour) in enumerate((("stock", BLUE), ("PVM, image not in the cache", VERMILLION))):
            speed = [1000 * batch_size / measured[batch_size][n][0][k] for n in visual]
            left.plot(visual, speed, marker=marker, color=colour, label=f"{name}, batch {batch_size}")
            if batch_size == max(measured):
                fits = [gigabytes * 1e9 * batch_size // measured[batch_size][n][1][k] for n in visual]
                right.plot(visual, fits, marker=marker, color=colour, label=name)
    left.set(ylabel="tokens per second", title="Decoding")
    right.set(ylabel="conversations", title=f"Largest batch whose cache fits into {gigabytes:g} GB")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="visual tokens of a conversation")
        axes.set_xticks(visual, [f"{n:,}" for n in visual])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def main() -> None:
    command_line = parser(__doc__)
    command_line.add_argument("--visual_tokens", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    command_line.add_argument("--prompts", type=int, nargs="+", default=[1024, 4096], help="visual tokens of prompts")
    command_line.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    command_line.add_argument("--steps", type=int, default=40, help="of each model, for each row; fewer for long ones")
    command_line.add_argument("--picture", help="file to draw into, e.g. image_kv_cache.png")
    command_line.add_argument("--gigabytes", type=float, default=8, help="for caches, in the picture")
    args = command_line.parse_args()
    stock, branched = build(args)
    print_environment(args, branched)

    rows, measured = [], {batch_size: {} for batch_size in args.batch_sizes}
    cases = [(batch, visual) for batch in args.batch_sizes for visual in args.visual_tokens]
    for batch_size, visual_tokens in tqdm(cases, desc="decode", unit="row"):
        steps = max(args.steps * 4096 // max(batch_size * visual_tokens, 4096), 8)
        pairs, sizes = decode(stock, branched, batch_size, visual_tokens, steps)
        row = row_of_ratios([str(batch_size), f"{visual_tokens:,}"], pairs)
        rows.append([*row, *(f"{size / 1e6:,.1f}" for size in sizes), f"{sizes[1] / sizes[0]:.3f}"])
        measured[batch_size][visual_tokens] = [statistics.median(column) for column in zip(*pairs)], sizes
    headings = ["batch", "visual", "stock, ms", "PVM, ms", "ratio", "quartiles", "stock, MB", "PVM, MB", "ratio"]
    print_table("A decode step and its cache, the image not in the cache", headings, rows)

    rows = []
    for visual_tokens in tqdm(args.prompts, desc="prompt", unit="row"):
        pairs = prompt(stock, branched, visual_tokens, max(3, 4096 * 4 // visual_tokens))
        rows.append(row_of_ratios([f"{visual_tokens:,} + {PROMPT_TOKENS}"], pairs))
    print_table("The prompt, the image skipped", ["visual + text", "stock, ms", "PVM, ms", "ratio", "quartiles"], rows)
    if args.picture:
        draw(args.picture, measured, args.gigabytes)


if __name__ == "__main__":
    main()
