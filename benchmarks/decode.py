"""
Cost of a decode step with branches, as a ratio to the stock model of the same shape in the same run.

    OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python -m benchmarks.decode
    python -m benchmarks.decode --shape 8B --device cuda --dtype bfloat16

A step is the forward pass of one token through decoder and language modelling head, on a cache with an image of
`--visual_tokens` and 64 tokens of text (random states, because a CPU needs minutes to prefill 16,384 tokens). Steps of
the two models are interleaved. Prints medians, and quartiles of the ratios of neighbouring steps.

transformers' dynamic cache is allocated anew in every step. With the malloc variables, freed memory is kept. Without
them most of a long step is page faults, whose times vary by more than a branch costs.
"""

import torch
from tqdm import tqdm
from transformers import Cache, DynamicCache

from benchmarks.common import (
    build,
    interleaved,
    milliseconds,
    parser,
    print_environment,
    print_table,
    row_of_ratios,
)
from cache_qwen3vl_pvm import VisualMemory, set_visual_memory


PROMPT_TOKENS = 64  # after the image
WARM_UP = 4


def filled_cache(states: torch.Tensor, layers: int) -> Cache:
    """A cache with `states` (`[batch, key_value_heads, sequence, head_dim]`) in all layers, not copied."""
    cache = DynamicCache(ddp_cache_data=[(states[:, :, :0], states[:, :, :0])] * layers)
    for layer in cache.layers:
        layer.keys = layer.values = states
    return cache


@torch.no_grad()
def measure(
    stock, branched, batch_size: int, visual_tokens: int, steps: int, device: str
) -> list[tuple[float, float]]:
    """Milliseconds of `steps` pairs of decode steps, stock and with branches."""
    config = branched.config.text_config
    options = {"device": device, "dtype": branched.dtype}
    length = visual_tokens + PROMPT_TOKENS
    states = torch.randn(batch_size, config.num_key_value_heads, length, config.head_dim, **options)
    memory_states = torch.randn(batch_size, config.pvm_num_key_value_heads, visual_tokens, config.head_dim, **options)
    positions = torch.arange(visual_tokens, dtype=torch.int32, device=device).expand(batch_size, -1)
    keys, values = (dict.fromkeys(config.pvm_layers, states) for states in (memory_states, memory_states.clone()))
    memory = VisualMemory(positions, torch.zeros_like(positions), True, keys, values)
    step = {
        "input_ids": torch.full((batch_size, 1), 9, device=device),
        "position_ids": torch.full((3, batch_size, 1), length, device=device),
    }

    def run(name: str) -> float:
        cache = filled_cache(states, config.num_hidden_layers)
        if name == "stock":
            return milliseconds(lambda: stock(**step, past_key_values=cache), device)
        set_visual_memory(cache, memory)
        return milliseconds(lambda: branched(**step, past_key_values=cache), device)

    return interleaved(run, WARM_UP, steps)


def main() -> None:
    command_line = parser(__doc__)
    command_line.add_argument("--visual_tokens", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    command_line.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    command_line.add_argument("--steps", type=int, default=60, help="of each model, for each row; fewer for long ones")
    args = command_line.parse_args()
    stock, branched = build(args)
    print_environment(args, branched)
    rows = []
    cases = [(batch, visual) for batch in args.batch_sizes for visual in args.visual_tokens]
    for batch_size, visual_tokens in tqdm(cases, unit="row"):
        steps = max(args.steps * 4096 // max(batch_size * visual_tokens, 4096), 12)
        pairs = measure(stock, branched, batch_size, visual_tokens, steps, args.device)
        rows.append(row_of_ratios([str(batch_size), f"{visual_tokens:,}", str(steps)], pairs))
    headings = ["batch", "visual tokens", "steps", "stock, ms", "PVM, ms", "ratio", "quartiles"]
    print_table("A decode step", headings, rows)


if __name__ == "__main__":
    main()
