"""
How much memory a GPU needs to train PVM, LoRA (rank 16) or everything, from the shapes of the released models.

    python -m benchmarks.training_memory

Parameters are counted on the real decoder and vision tower, on the meta device. What a layer keeps for backward is
measured, in bf16 at the real width, on decoders of 2 and 3 layers; it is the same for every layer and token. The rest
is arithmetic: 16 bytes for a trained parameter (float32 weight, gradient, AdamW's two moments), 2 for a frozen one.
Add 2 to 4 GiB for the CUDA context, fragmentation and temporary memory of kernels.
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import Qwen3VLConfig

from benchmarks.common import SHAPES, build, print_table
from benchmarks.training import batch_of, saved_bytes
from configuration_qwen3vl_pvm import Qwen3VLPVMConfig, default_pvm_layers
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration, pvm_blocks
from pvm.training.methods import LORA_TARGETS


# Vision towers of the released models.
SMALL_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
LARGE_TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
TOWERS = {"2B": SMALL_TOWER, "4B": SMALL_TOWER, "8B": LARGE_TOWER, "32B": LARGE_TOWER}
VISUAL, TEXT = 96, 32  # tokens of a measurement
GIB = 2**30


def kept_per_token(shape: str, method: str) -> tuple[float, float]:
    """Bytes kept for backward per token: by a layer without a branch, and by the rest, the layer with one included."""
    kept = []
    for layers in (2, 3):
        args = argparse.Namespace(shape=shape, device="cpu", dtype="bfloat16", attn_implementation="sdpa")
        stock, model = build(args, depth=1, num_hidden_layers=layers, pvm_layers=[0], vocab_size=2000)
        batch = batch_of(model, VISUAL, TEXT)
        batch["labels"][:, :-1] = -100  # logits are counted separately
        if method == "pvm":
            model.requires_grad_(False)
            for block in pvm_blocks(model).values():
                block.requires_grad_(True).float()
        else:
            model = stock.requires_grad_(method == "full")
            if method == "lora":
                model = get_peft_model(model, LoraConfig(r=16, target_modules=LORA_TARGETS))
        kept.append(saved_bytes(model.train(), batch) / (VISUAL + TEXT))
    per_layer = kept[1] - kept[0]
    return per_layer, kept[0] - per_layer


def parameters(shape: str) -> dict[str, int]:
    """Number of parameters of the branches, of LoRA, and of the base."""
    text = SHAPES[shape]
    stock = Qwen3VLConfig(
        text_config=text["text_config"],
        vision_config={**TOWERS[shape], "num_heads": 16, "out_hidden_size": text["text_config"]["hidden_size"]},
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    with torch.device("meta"):
        model = Qwen3VLPVMForConditionalGeneration(Qwen3VLPVMConfig.from_stock(stock))
        added = sum(p.numel() for block in pvm_blocks(model).values() for p in block.parameters())
        base = model.num_parameters() - added
        lora = get_peft_model(model, LoraConfig(r=16, target_modules=LORA_TARGETS))
        adapters = sum(p.numel() for name, p in lora.named_parameters() if ".lora_" in name)
    return {"pvm": added, "lora": adapters, "base": base}


def main() -> None:
    command_line = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command_line.add_argument("--shapes", nargs="+", choices=TOWERS, default=list(TOWERS))
    command_line.add_argument("--tokens", type=int, default=4096, help="tokens per GPU, visual ones included")
    command_line.add_argument("--labels", type=int, default=1024, help="how many of them have a label")
    command_line.add_argument("--gpus", type=int, default=8, help="number of GPUs over which FSDP shards the weights")
    args = command_line.parse_args()
    rows = []
    for shape in tqdm(args.shapes, unit="shape"):
        count, text = parameters(shape), SHAPES[shape]["text_config"]
        layers, hidden = text["num_hidden_layers"], text["hidden_size"]
        first = default_pvm_layers(hidden, layers)[0]
        # bf16 logits, float32 logits, their softmax and its gradient.
        logits = args.labels * text["vocab_size"] * (2 + 4 + 4 + 4)
        for method in ("pvm", "lora", "full"):
            per_layer, rest = kept_per_token(shape, method)
            reached = layers - first if method == "pvm" else layers
            trained = count["base"] if method == "full" else count[method]
            frozen = 0 if method == "full" else 2 * count["base"]
            weights = frozen + 16 * trained
            kept = args.tokens * (rest + (reached - 1) * per_layer)
            # With checkpointing a layer keeps its input only, and one layer at a time is computed again.
            checkpointed = args.tokens * (rest + reached * hidden * 2 + per_layer)
            rows.append(
                [
                    f"{shape} {method}",
                    f"{trained / 1e6:,.1f} M",
                    f"{per_layer / 1024:,.0f}",
                    *(f"{size / GIB:,.1f}" for size in (weights, kept, checkpointed, logits)),
                    f"{(weights + kept + logits) / GIB:,.0f}",
                    f"{(weights + checkpointed + logits) / GIB:,.0f}",
                    f"{(weights / args.gpus + checkpointed + logits) / GIB:,.0f}",
                ]
            )
    print(f"GiB for {args.tokens:,} tokens on a GPU, {args.labels:,} of them labels.")
    print("kept: for backward; ckpt: the same with gradient checkpointing; totals: the whole model on each GPU (DDP),")
    print(f"the same with checkpointing, and with checkpointing and the model sharded over {args.gpus}.\n")
    headings = ["", "trained", "KiB/layer/token", "weights", "kept", "ckpt", "logits", "DDP", "+ckpt", "FSDP+ckpt"]
    print_table("Memory to train", headings, rows)


if __name__ == "__main__":
    main()
