"""
Where a branch spends its time in a decode step, and the least that this machine allows.

    OMP_NUM_THREADS=1 python -m benchmarks.decode_profile

A step of one token reads all weights once, so on most machines it is limited by memory bandwidth. The stock linear
layers show how fast this machine reads weights in such a step. The column "floor" is the time that a branch would
take at that rate if its small operations cost nothing.
"""

import statistics
import time
from collections import defaultdict

import torch

from benchmarks.common import build, parameter_bytes, parser, print_environment, print_table
from benchmarks.decode import PROMPT_TOKENS, filled_cache
from cache_qwen3vl_pvm import VisualMemory, set_visual_memory
from modeling_qwen3vl_pvm import pvm_blocks


WARM_UP = 5


def main() -> None:
    command_line = parser(__doc__)
    command_line.add_argument("--visual_tokens", type=int, default=1024)
    command_line.add_argument("--steps", type=int, default=100)
    args = command_line.parse_args()
    if args.device != "cpu":
        command_line.error("the clock around each module stops the CPU only; on a GPU use torch.profiler")
    _, branched = build(args)
    print_environment(args, branched)
    config, blocks = branched.config.text_config, list(pvm_blocks(branched).values())

    times = defaultdict(list)  # of one step: module -> milliseconds
    started = {}

    def stop(module, inputs, output):
        times[module].append(1000 * (time.perf_counter() - started[module]))

    parts = {
        "the branch": blocks,
        "text_reducer": [block.text_reducer for block in blocks],
        "cross_attn: q_proj, o_proj": [
            part for block in blocks for part in (block.cross_attn.q_proj, block.cross_attn.o_proj)
        ],
        "cross_attn: q_norm": [block.cross_attn.q_norm for block in blocks],
        "cross_attn, all": [block.cross_attn for block in blocks],
        "input_norm, post_attn_norm": [part for block in blocks for part in (block.input_norm, block.post_attn_norm)],
        "mlp": [block.mlp for block in blocks],
        "output_expander": [block.output_expander for block in blocks],
        "stock: linear layers": [
            module
            for name, module in branched.model.language_model.named_modules()
            if isinstance(module, torch.nn.Linear) and ".pvm_block." not in name
        ],
    }
    for module in {module for modules in parts.values() for module in modules}:
        module.register_forward_pre_hook(lambda module, inputs: started.__setitem__(module, time.perf_counter()))
        module.register_forward_hook(stop)

    states = torch.randn(1, config.num_key_value_heads, args.visual_tokens + PROMPT_TOKENS, config.head_dim)
    states = states.to(branched.dtype)
    memory_states = states[:, : config.pvm_num_key_value_heads, : args.visual_tokens].clone()
    positions = torch.arange(args.visual_tokens, dtype=torch.int32)[None]
    keys, values = (dict.fromkeys(config.pvm_layers, states) for states in (memory_states, memory_states.clone()))
    memory = VisualMemory(positions, torch.zeros_like(positions), True, keys, values)
    step = {
        "input_ids": torch.full((1, 1), 9),
        "position_ids": torch.full((3, 1, 1), args.visual_tokens + PROMPT_TOKENS),
    }
    whole = []
    with torch.no_grad():
        for _ in range(WARM_UP + args.steps):
            cache = filled_cache(states, config.num_hidden_layers)
            set_visual_memory(cache, memory)
            start = time.perf_counter()
            branched(**step, past_key_values=cache)
            whole.append(1000 * (time.perf_counter() - start))
    whole = statistics.median(whole[WARM_UP:])

    def median(modules) -> float:
        return sum(statistics.median(times[module][WARM_UP:]) for module in modules)

    linear = parts["stock: linear layers"]
    bytes_per_ms = sum(map(parameter_bytes, linear)) / median(linear)
    rows = []
    for name, modules in parts.items():
        weights = sum(map(parameter_bytes, modules))
        # k_proj, v_proj and vision_reducer are not read in a decode step; the memory is.
        if name in ("the branch", "cross_attn, all"):
            unused = [part for block in blocks for part in (block.cross_attn.k_proj, block.cross_attn.v_proj)]
            unused += [block.vision_reducer for block in blocks] if name == "the branch" else []
            weights -= sum(map(parameter_bytes, unused))
            weights += 2 * memory_states.nbytes * len(blocks)
        rows.append(
            [
                name,
                f"{weights / 2**20:.2f}",
                f"{median(modules):.3f}",
                f"{median(modules) / whole:.2%}",
                f"{weights / bytes_per_ms:.3f}",
            ]
        )
    rows.append(["the whole step", "", f"{whole:.3f}", "", ""])
    print(f"Stock linear layers read their weights at {bytes_per_ms / 1e6:.1f} GB/s.\n")
    headings = ["all branches together", "MiB read", "ms", "of the step", "floor, ms"]
    print_table(f"A decode step, {args.visual_tokens:,} visual tokens", headings, rows)
    stock = whole - median(blocks)
    weights = float(rows[0][4])
    print(f"ratio to a step without the branches: {whole / stock:.3f}; at the floor: {1 + weights / stock:.3f}")


if __name__ == "__main__":
    main()
