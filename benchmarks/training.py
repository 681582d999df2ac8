"""
Cost of a training step: PVM, LoRA (rank 16, all linear layers of the language model) and full fine-tuning.

    python -m benchmarks.training
    python -m benchmarks.training --shape 8B --device cuda --dtype bfloat16 --visual_tokens 1024 --methods PVM LoRA

A step is forward and backward of one conversation with train.py's loss, and AdamW. "Kept for backward" are the bytes
that autograd holds after the forward pass, without parameters. Steps of the methods are interleaved. Prints medians,
and ratios to LoRA. "PVM, no image" is a step that image dropout hides the image in; with `--image_dropout 0.5` a mean
step is the mean of both kinds. On a GPU, "peak" is what a step allocates at most, beside weights and optimizer.
"""

import statistics
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

from benchmarks.common import build, milliseconds, parser, print_environment, print_table
from modeling_qwen3vl_pvm import pvm_blocks
from pvm.checkpoints.record import count_parameters
from pvm.training.image_dropout import without_image
from pvm.training.methods import LORA_TARGETS
from pvm.training.trainer import loss_of_predictions, predictions


WARM_UP = 1
METHODS = ["PVM", "LoRA", "full"]


def batch_of(model: torch.nn.Module, visual_tokens: int, text_tokens: int) -> dict[str, torch.Tensor]:
    """An image, then text, the second half of which is the answer."""
    vision, device = model.config.vision_config, model.device
    patches, rows = visual_tokens * vision.spatial_merge_size**2, 2 * vision.spatial_merge_size
    patch_size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    input_ids = torch.randint(10, 1000, (1, visual_tokens + text_tokens), device=device)
    input_ids[:, :visual_tokens] = model.config.image_token_id
    labels = input_ids.clone()
    labels[:, : -text_tokens // 2] = -100
    return {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == model.config.image_token_id).int(),
        "pixel_values": torch.randn(patches, patch_size, device=device, dtype=model.dtype),
        "image_grid_thw": torch.tensor([[1, rows, patches // rows]], device=device),
    }


def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    positions, targets = predictions(batch["labels"])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return loss_of_predictions(model(**inputs, use_cache=False, logits_to_keep=positions), targets)


def saved_bytes(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for backward, without parameters, each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model, batch)
    return sum(storage.nbytes() for storage in storages.values())


def peak(function: Callable[[], object]) -> int:
    """The bytes on the GPU that `function` allocates at most."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    command_line = parser(__doc__)
    command_line.add_argument("--visual_tokens", type=int, default=256)
    command_line.add_argument("--text_tokens", type=int, default=256)
    command_line.add_argument("--steps", type=int, default=6, help="of each method")
    command_line.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, help="LoRA is always measured, for the ratios"
    )
    args = command_line.parse_args()
    stock, pvm = build(args)
    print_environment(args, pvm)

    pvm.requires_grad_(False)
    for block in pvm_blocks(pvm).values():
        block.requires_grad_(True).float()
    lora = get_peft_model(stock.requires_grad_(False), LoraConfig(r=16, lora_alpha=32, target_modules=LORA_TARGETS))
    methods = {"LoRA": lora}
    if "PVM" in args.methods:
        methods |= {"PVM": pvm, "PVM, no image": pvm}
    if "full" in args.methods:
        methods["full"] = build(args)[0].requires_grad_(True)
    batch = batch_of(pvm, args.visual_tokens, args.text_tokens)
    batches = {name: without_image(pvm, batch) if name == "PVM, no image" else batch for name in methods}
    optimizers = {
        name: torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-5)
        for name, model in methods.items()
    }

    def step(name: str) -> None:
        forward(methods[name], batches[name]).backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    times = {name: [] for name in methods}
    for number in tqdm(range(WARM_UP + args.steps), unit="step of each"):
        # The order alternates, because the state of caches and allocator that one leaves affects the next.
        for name in sorted(methods, reverse=number % 2 == 1):
            times[name].append(milliseconds(lambda name=name: step(name), args.device))
    medians = {name: statistics.median(taken[WARM_UP:]) for name, taken in times.items()}
    saved = {name: saved_bytes(model, batches[name]) for name, model in methods.items()}
    trained = {name: count_parameters(model)[-1].trainable for name, model in methods.items()}
    peaks = {name: peak(lambda name=name: step(name)) for name in methods} if args.device == "cuda" else {}
    if "PVM" in methods:
        for numbers in (medians, saved, trained):
            numbers["PVM, dropout 0.5"] = (numbers["PVM"] + numbers["PVM, no image"]) / 2
    rows = [
        [
            name,
            f"{trained[name]:,.0f}",
            f"{medians[name]:,.0f}",
            f"{medians[name] / medians['LoRA']:.2f}",
            f"{saved[name] / 2**20:,.1f}",
            f"{saved[name] / saved['LoRA']:.2f}",
            *([f"{peaks[name] / 2**30:.2f}" if name in peaks else ""] if peaks else []),
        ]
        for name in ("PVM", "PVM, no image", "PVM, dropout 0.5", "LoRA", "full")
        if name in medians
    ]
    headings = ["", "trained", "step, ms", "of LoRA", "kept for backward, MiB", "of LoRA"]
    headings += ["peak, GiB"] if peaks else []
    title = f"A training step, {args.visual_tokens:,} visual and {args.text_tokens:,} text tokens, {args.steps} steps"
    print_table(title, headings, rows)


if __name__ == "__main__":
    main()
