"""
`generate()` from an image to the last token: first token, time of a later token, memory, and whether tokens agree.

    python -m benchmarks.generation
    python -m benchmarks.generation --shape 8B --device cuda --dtype bfloat16 --compile

The stock model; with branches, switched off, on, and with the image not in the KV cache (`image_kv_cache`). With
`--compile`, stock and on also with a static cache and torch.compile. Ways take turns. "same tokens" compares with the
stock model for "off", and with the way that is not compiled for one that is; "peak" is what a run allocates at most on
a GPU beside the weights. The vision tower is a small one. Prints medians over the runs.
"""

import statistics
import time

import torch
from tqdm import tqdm
from transformers import CompileConfig
from transformers.generation.streamers import BaseStreamer

from benchmarks.common import build, parser, print_environment, print_table
from benchmarks.prefill import image_prompt
from benchmarks.training import peak


WARM_UP = 1
EXPECTED = {"off": "stock", "stock, compiled": "stock", "on, compiled": "on"}  # tokens that must be the same


class Clock(BaseStreamer):
    """Notes when `generate()` has the prompt, and when each token, which it copies to the CPU for that."""

    def __init__(self):
        self.times = [time.perf_counter()]

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def milliseconds(self) -> tuple[float, float]:
        """Until the first token, and the median of a later one."""
        start, _, first, *later = self.times
        steps = [after - before for before, after in zip([first, *later], later)]
        return 1000 * (first - start), 1000 * statistics.median(steps)


def main() -> None:
    command_line = parser(__doc__)
    command_line.add_argument("--visual_tokens", type=int, nargs="+", default=[1024])
    command_line.add_argument("--new_tokens", type=int, default=64)
    command_line.add_argument("--runs", type=int, default=3, help="of each way, after one that does not count")
    command_line.add_argument("--compile", action="store_true", help="measure torch.compile, too")
    args = command_line.parse_args()
    stock, branched = build(args)
    print_environment(args, branched)
    ways = {
        "stock": (stock, {}),
        "off": (branched, {"use_pvm": False}),
        "on": (branched, {}),
        "on, evict": (branched, {"image_kv_cache": "evict"}),
        "on, skip": (branched, {"image_kv_cache": "skip"}),
    }
    if args.compile:
        compiled = CompileConfig()
        compiled._compile_all_devices = True  # for rehearsals on a CPU, which generate() does not compile for
        static = {"cache_implementation": "static", "compile_config": compiled}
        ways |= {f"{name}, compiled": (ways[name][0], static) for name in ("stock", "on")}

    rows = []
    for visual_tokens in args.visual_tokens:
        prompt = image_prompt(stock, visual_tokens)
        options = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
        times, tokens, peaks = {name: [] for name in ways}, {}, {}

        def run(name: str, prompt=prompt, options=options, times=times, tokens=tokens) -> None:
            model, more = ways[name]
            clock = Clock()
            tokens[name] = model.generate(**prompt, **options, **more, do_sample=False, pad_token_id=0, streamer=clock)
            times[name].append(clock.milliseconds())

        for number in tqdm(range(WARM_UP + args.runs), desc=f"{visual_tokens:,} visual tokens", unit="run of each"):
            for name in sorted(ways, reverse=number % 2 == 1):
                run(name)
        if args.device == "cuda":
            peaks = {name: peak(lambda name=name: run(name)) for name in ways}
        medians = {
            name: [statistics.median(column) for column in zip(*taken[WARM_UP:])] for name, taken in times.items()
        }
        for name, (first, later) in medians.items():
            agrees = ""
            if other := EXPECTED.get(name):
                same = (tokens[name] == tokens[other])[:, -args.new_tokens :]
                agrees = f"{same.sum()} of {same.numel()}"
            ratios = [f"{value / of_stock:.3f}" for value, of_stock in zip((first, later), medians["stock"])]
            memory = f"{peaks[name] / 2**20:,.0f}" if peaks else ""
            rows.append(
                [name, f"{visual_tokens:,}", f"{first:.1f}", ratios[0], f"{later:.2f}", ratios[1], memory, agrees]
            )
    headings = ["", "visual", "first token, ms", "of stock", "later, ms", "of stock", "peak, MiB", "same tokens"]
    print_table(f"generate(), {args.new_tokens} new tokens, {args.runs} runs", headings, rows)


if __name__ == "__main__":
    main()
