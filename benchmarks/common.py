"""Shared by the benchmarks: shapes, a stock model and one with branches on the same weights, timing, tables."""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import Qwen3VLForConditionalGeneration

from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration, pvm_blocks


IMAGE_TOKEN = 151655
REAL = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8}
# Text decoders of the released models, a small one for CPUs, and one to see that a benchmark runs.
SHAPES = {
    "tiny": {
        "text_config": {
            "vocab_size": 2000,
            "head_dim": 128,
            "num_key_value_heads": 1,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
        },
        "pvm_hidden_size": 256,
        "tie_word_embeddings": True,
    },
    "cpu": {
        "text_config": {
            **REAL,
            "vocab_size": 32000,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
        },
        "pvm_hidden_size": 256,
        "tie_word_embeddings": True,
    },
    "2B": {
        "text_config": {
            **REAL,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
        },
        "tie_word_embeddings": True,
    },
    "4B": {
        "text_config": {
            **REAL,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
        },
        "tie_word_embeddings": True,
    },
    "8B": {
        "text_config": {
            **REAL,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
        },
        "tie_word_embeddings": False,
    },
    "32B": {
        "text_config": {
            **REAL,
            "hidden_size": 5120,
            "intermediate_size": 25600,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
        },
        "tie_word_embeddings": False,
    },
}
ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}


def parser(description: str) -> argparse.ArgumentParser:
    """A command line with shape, device, dtype and attention of the model."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu", help="cpu: 12 layers, hidden size 1,024")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--attn_implementation", default="sdpa", help="sdpa, eager or flash_attention_2")
    return parser


def build(
    args: argparse.Namespace, depth: int = 2, pvm_layers: list[int] | None = None, **text_fields
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """
    The stock model, and one with branches whose gates are 0.1. Weights are random, and shared where both have them.

    Args:
        args: the parsed command line.
        depth (`int`): number of layers of the (small) vision tower.
        pvm_layers, text_fields: replace fields of the shape.
    """
    shape = SHAPES[args.shape]
    vision_config = {
        "depth": depth,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_heads": 4,
        "out_hidden_size": shape["text_config"]["hidden_size"],
        "deepstack_visual_indexes": list(range(min(depth, 3))),
    }
    text_config = {**shape["text_config"], **text_fields, "rope_parameters": ROPE, "dtype": args.dtype}
    stock_config = transformers.Qwen3VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=min(IMAGE_TOKEN, text_config["vocab_size"] - 1),
        tie_word_embeddings=shape["tie_word_embeddings"],
    )
    config = Qwen3VLPVMConfig.from_stock(
        stock_config, pvm_layers=pvm_layers, pvm_hidden_size=shape.get("pvm_hidden_size", 512)
    )
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(args.device):
        branched = Qwen3VLPVMForConditionalGeneration(config).eval()
    with torch.device("meta"):
        stock = Qwen3VLForConditionalGeneration(stock_config).eval()
    torch.set_default_dtype(torch.float32)
    shared = {name: tensor for name, tensor in branched.state_dict().items() if ".pvm_block." not in name}
    stock.load_state_dict(shared, assign=True)
    # Inverse frequencies are buffers outside of the state dict.
    stock.model.language_model.rotary_emb = branched.model.language_model.rotary_emb
    stock.model.visual.rotary_pos_emb = branched.model.visual.rotary_pos_emb
    for block in pvm_blocks(branched).values():
        torch.nn.init.constant_(block.gate_alpha, 0.1)
    for model in (stock, branched):
        model.set_attn_implementation(args.attn_implementation)
    return stock, branched


def parameter_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def milliseconds(function: Callable[[], object], device: str) -> float:
    """Milliseconds of one call, including work that it queued on the device."""
    if device != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.accelerator.synchronize()
    return 1000 * (time.perf_counter() - start)


def interleaved(run: Callable[[str], float], warm_up: int, times: int) -> list[tuple[float, float]]:
    """
    `times` runs of both models in turn, after `warm_up` that do not count. They take turns in going first, because
    the state of caches and allocator that one run leaves affects the next.

    Args:
        run: milliseconds of one run of the model "stock" or "branched".
    """
    pairs = []
    for number in range(warm_up + times):
        order = ("stock", "branched") if number % 2 else ("branched", "stock")
        taken = {name: run(name) for name in order}
        pairs.append((taken["stock"], taken["branched"]))
    return pairs[warm_up:]


def row_of_ratios(label: Sequence[str], pairs: Sequence[tuple[float, float]]) -> list[str]:
    """A table row from the times of neighbouring runs (stock, with branches): medians, and quartiles of the ratio."""
    low, middle, high = statistics.quantiles([branched / stock for stock, branched in pairs], n=4)
    medians = [f"{statistics.median(column):.2f}" for column in zip(*pairs)]
    return [*label, *medians, f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)


def print_environment(args: argparse.Namespace, branched: torch.nn.Module) -> None:
    """Print hardware, versions and shape."""
    hardware = torch.accelerator.current_accelerator() and torch.cuda.get_device_name() if args.device != "cpu" else ""
    cpuinfo = Path("/proc/cpuinfo")
    if not hardware and cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        hardware = f"{models[0]}, {torch.get_num_threads()} thread(s) of {len(models)}"
    added = sum(parameter_bytes(block) for block in pvm_blocks(branched).values())
    # The vision tower does not take part in decoding.
    language = parameter_bytes(branched.model.language_model) - added
    if not branched.config.tie_word_embeddings:
        language += parameter_bytes(branched.lm_head)
    print(f"{hardware}; torch {torch.__version__}, transformers {transformers.__version__}")
    print(
        f"shape {args.shape}, {args.dtype}, {args.attn_implementation}: branches in layers "
        f"{branched.config.text_config.pvm_layers}, {added / language:.1%} more parameters than the stock decoder\n"
    )
