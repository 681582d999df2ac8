"""
Cost of the prompt with branches, as a ratio to the stock model of the same shape in the same run.

    python -m benchmarks.prefill
    python -m benchmarks.prefill --shape 8B --device cuda --dtype bfloat16

Prefill is the decoder's forward pass over an image of `--visual_tokens` and 64 tokens of text, with an empty cache.
Time to first token is `generate()` of one token, vision tower included; the tower is small, so that the decoder's
share is large. Runs of the two models are interleaved. Prints medians, and quartiles of the ratios of neighbouring
runs.
"""

from collections.abc import Callable

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
from modeling_qwen3vl_pvm import pvm_blocks


TEXT_TOKENS = 64
WARM_UP = 1


@torch.no_grad()
def prefill(model: torch.nn.Module, visual_tokens: int) -> None:
    length, device = visual_tokens + TEXT_TOKENS, model.device
    decoder = model.model.language_model
    decoder(
        inputs_embeds=torch.randn(1, length, decoder.config.hidden_size, device=device, dtype=model.dtype),
        position_ids=torch.arange(length, device=device).expand(3, 1, -1),
        visual_pos_masks=(torch.arange(length, device=device) < visual_tokens)[None],
        past_key_values=DynamicCache(config=decoder.config),
    )


def image_prompt(model: torch.nn.Module, visual_tokens: int) -> dict[str, torch.Tensor]:
    """Inputs of `generate()`: an image and text."""
    vision, device = model.config.vision_config, model.device
    patches, rows = visual_tokens * vision.spatial_merge_size**2, 2 * vision.spatial_merge_size
    patch_size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    input_ids = torch.full((1, visual_tokens + TEXT_TOKENS), 9, device=device)
    input_ids[:, :visual_tokens] = model.config.image_token_id
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == model.config.image_token_id).int(),
        "pixel_values": torch.randn(patches, patch_size, device=device, dtype=model.dtype),
        "image_grid_thw": torch.tensor([[1, rows, patches // rows]], device=device),
    }


@torch.no_grad()
def first_token(model: torch.nn.Module, visual_tokens: int) -> None:
    model.generate(**image_prompt(model, visual_tokens), max_new_tokens=1, do_sample=False, pad_token_id=0)


def measure(
    function: Callable[[torch.nn.Module, int], None], models: dict[str, torch.nn.Module], visual_tokens: int, runs: int
) -> list[tuple[float, float]]:
    """Milliseconds of `runs` pairs of runs, stock and with branches."""

    def run(name: str) -> float:
        return milliseconds(lambda: function(models[name], visual_tokens), models[name].device.type)

    return interleaved(run, WARM_UP, runs)


def main() -> None:
    command_line = parser(__doc__)
    command_line.add_argument("--visual_tokens", type=int, nargs="+", default=[1024, 4096])
    command_line.add_argument("--runs", type=int, default=8, help="of each model, for each row")
    args = command_line.parse_args()
    stock, branched = build(args)
    print_environment(args, branched)

    seen = []
    hook = next(iter(pvm_blocks(branched).values())).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[2])
    )
    prefill(branched, 256)
    hook.remove()
    print(f"Queries of a branch: {seen[0].attends.shape[1]} of {256 + TEXT_TOKENS} tokens; mask: {seen[0].mask}\n")

    models, rows = {"stock": stock, "branched": branched}, []
    for name, function in (("prefill", prefill), ("time to first token", first_token)):
        for visual_tokens in tqdm(args.visual_tokens, desc=name, unit="row"):
            pairs = measure(function, models, visual_tokens, args.runs)
            rows.append(row_of_ratios([name, f"{visual_tokens:,} + {TEXT_TOKENS}", str(args.runs)], pairs))
    print_table("The prompt", ["", "visual + text", "runs", "stock, ms", "PVM, ms", "ratio", "quartiles"], rows)


if __name__ == "__main__":
    main()
