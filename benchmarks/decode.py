"""
What a decode step costs with branches, as a ratio to the stock decoder of the same shape in the same run.

    OMP_NUM_THREADS=1 python -m benchmarks.decode

The shape is one that a CPU runs in milliseconds: 12 layers, hidden size 1,024, 3 branches of width 256 (2.1 % more
parameters), float32, batch 1. Steps of the two models are interleaved; printed are medians, and the quartiles of the
ratios of neighbouring steps.
"""

import pvm  # noqa: F401, I001  (first: it makes torchvision importable where its compiled operators are missing)

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from configuration_qwen3vl_pvm import Qwen3VLPVMTextConfig
from modeling_qwen3vl_pvm import Qwen3VLPVMTextModel


VISUAL_TOKENS = (256, 1024, 4096, 16384)
TEXT_TOKENS = 64  # of the prompt, after the image
WARM_UP, STEPS = 5, 60
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [24, 20, 20]},
}


@torch.no_grad()
def prefill(model: torch.nn.Module, visual_tokens: int) -> DynamicCache:
    """A cache that holds an image of so many tokens and the prompt."""
    cache = DynamicCache(config=model.config)
    embeds = torch.randn(1, visual_tokens + TEXT_TOKENS, SHAPE["hidden_size"])
    visual = (torch.arange(embeds.shape[1]) < visual_tokens)[None]
    model(inputs_embeds=embeds, visual_pos_masks=visual, past_key_values=cache)
    return cache


@torch.no_grad()
def step(model: torch.nn.Module, cache: DynamicCache) -> float:
    """Milliseconds of one decode step."""
    start = time.perf_counter()
    model(input_ids=torch.tensor([[9]]), past_key_values=cache)
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    torch.manual_seed(0)
    stock = Qwen3VLTextModel(Qwen3VLTextConfig(**SHAPE)).eval()
    branched = Qwen3VLPVMTextModel(Qwen3VLPVMTextConfig(**SHAPE, pvm_hidden_size=256)).eval()
    table = Table(title=f"a decode step, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    for heading in ("visual tokens", "stock, ms", "PVM, ms", "ratio", "quartiles"):
        table.add_column(heading, justify="right")
    for visual_tokens in VISUAL_TOKENS:
        caches = prefill(stock, visual_tokens), prefill(branched, visual_tokens)
        times = [(step(stock, caches[0]), step(branched, caches[1])) for _ in range(WARM_UP + STEPS)][WARM_UP:]
        ratios = [with_branches / without for without, with_branches in times]
        low, middle, high = statistics.quantiles(ratios, n=4)
        medians = [f"{statistics.median(column):.2f}" for column in zip(*times)]
        table.add_row(f"{visual_tokens:,}", *medians, f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
