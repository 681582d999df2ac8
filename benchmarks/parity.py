"""
How closely this machine reproduces the authors' recorded logits and greedy tokens (tests/reference_case).

    python -m benchmarks.parity --device cuda

The case is small and was recorded in float32 on a CPU, its gates open. "without" is the change of the logits that the
branches make, for scale. Attention that cannot be had is left out, and named.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.utils import is_flash_attn_2_available

from benchmarks.common import print_table
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration


CASE = Path(__file__).parents[1] / "tests" / "reference_case"
IMAGE_TOKEN = 990
NEW_TOKENS = 20


@torch.no_grad()
def compare(model: Qwen3VLPVMForConditionalGeneration, name: str) -> list[str]:
    """A table row: differences from what was recorded for the inputs `name`."""
    batch = {key: value.to(model.device) for key, value in load_file(CASE / f"{name}.inputs.safetensors").items()}
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).long()
    real = batch["attention_mask"].bool().cpu()
    recorded = load_file(CASE / f"{name}.logits.safetensors")
    logits = model(**batch, use_cache=False).logits.float().cpu()[real]
    expected, without = (recorded[key][real].float() for key in ("logits", "logits_gate_zero"))
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].cpu()
    same = tokens == load_file(CASE / f"{name}.greedy.safetensors")["new_tokens"]
    return [
        f"{(logits - expected).abs().max():.1e}",
        f"{(expected - without).abs().max():.1e}",
        f"{(logits.argmax(-1) == expected.argmax(-1)).float().mean():.1%}",
        f"{same.sum()} of {same.numel()}",
    ]


def main() -> None:
    command_line = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command_line.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    args = command_line.parse_args()
    kinds = [(dtype, attention) for dtype in ("float32", "bfloat16") for attention in ("eager", "sdpa")]
    if args.device != "cpu" and is_flash_attn_2_available():
        kinds.append(("bfloat16", "flash_attention_2"))
    else:
        print("flash_attention_2 is left out: it needs a GPU and the package flash-attn.")
    rows = []
    for dtype, attention in kinds:
        model = Qwen3VLPVMForConditionalGeneration.from_pretrained(CASE, dtype=dtype, attn_implementation=attention)
        model = model.to(args.device).eval()
        for name in ("a_one_image", "b_two_sizes_left"):
            rows.append([dtype, attention, name, *compare(model, name)])
    headings = ["dtype", "attention", "inputs", "largest difference", "without", "same first choice", "greedy tokens"]
    print_table("The authors' recorded logits", headings, rows)


if __name__ == "__main__":
    main()
