"""
Writes a checkpoint of each kind as this release does, with the logits that it gives: later releases must load them.
Also writes the hashes of its code into pvm/checkpoints/releases.json, by which `python -m pvm inspect` knows it.

    PYTHONPATH=.:tests python tests/release_fixture.py tests/release_0.1.0
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

import pvm  # noqa: F401
import tiny
from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration
from pvm.checkpoints.code import RELEASES
from pvm.training.methods import LORA_TARGETS
from pvm.training.trainer import PVMTrainer, PVMTrainingArguments


BATCH = tiny.inputs(*tiny.BATCHES["mixed rows"])


def save_run(model, method: str, folder: Path) -> None:
    """What a training's save writes."""
    arguments = PVMTrainingArguments(str(folder), use_cpu=True)
    trainer = PVMTrainer(model, arguments, settings={"method": method})
    trainer.state.global_step = trainer.state.max_steps = 10
    trainer.save_model()


def code_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each code file of a checkpoint."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.py"))}


def main(folder: Path) -> None:
    torch.manual_seed(0)
    tiny.build_stock().to(torch.bfloat16).save_pretrained(folder / "base")
    config = Qwen3VLPVMConfig.from_stock(tiny.stock_config(), pvm_layers=[1, 2], pvm_hidden_size=32)

    def with_branches() -> Qwen3VLPVMForConditionalGeneration:
        torch.manual_seed(1)
        model = Qwen3VLPVMForConditionalGeneration.from_pretrained(folder / "base", config=config, dtype="bfloat16")
        tiny.set_gates(model, 0.5)
        model.config.base_model_name_or_path = "org/base"  # its place is passed when it is loaded
        return model

    save_run(with_branches(), "pvm", folder / "adapter")
    model = with_branches()
    model.save_pretrained(folder / "whole")
    lora = LoraConfig(
        r=2, target_modules=LORA_TARGETS, modules_to_save=["pvm_block"], init_lora_weights=False,
        base_model_name_or_path="org/base"
    )  # fmt: skip
    save_run(get_peft_model(model, lora), "pvm+lora", folder / "adapter_with_lora")
    load = Qwen3VLPVMForConditionalGeneration.from_pretrained
    logits = {
        kind: tiny.logits(load(folder / kind, dtype="float32", **base), BATCH)
        for kind, base in (
            ("whole", {}),
            ("adapter", {"base_model_name_or_path": str(folder / "base")}),
            ("adapter_with_lora", {"base_model_name_or_path": str(folder / "base")}),
        )
    }
    save_file({**BATCH, **logits}, folder / "expected.safetensors")
    known = json.loads(RELEASES.read_text()) | {folder.name.removeprefix("release_"): code_hashes(folder / "whole")}
    RELEASES.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
