"""training.json, the record of a training in its checkpoints: what was trained, on what and how."""

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerState

from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from pvm.checkpoints.names import public_name


RECORD = "training.json"
# In the names of the frozen originals that peft keeps of modules that train as copies.
PEFT_ORIGINAL = ".original_module"
PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate")
# The settings of a run that are recorded.
RECIPE = (
    *("dataset_config", "dataset_split", "max_samples", "max_length", "train_on", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "num_processes", "learning_rate", "gate_learning_rate", "lr_scheduler_type"),
    *("warmup_steps", "weight_decay", "optim", "bf16", "fp16", "dtype", "load_in_4bit", "lora_rank", "lora_alpha"),
    *("image_dropout", "num_generations", "max_completion_length", "temperature", "loss_type", "reward_functions"),
    *("reward_weights", "match", "seed"),
)


@dataclass
class ParameterCount:
    """Number of parameters of a part of the model, in total and trainable."""

    part: str
    total: int
    trainable: int


def count_parameters(model: torch.nn.Module) -> list[ParameterCount]:
    """Counts by part (vision tower, language model with its head, branches, LoRA), and the sum as the last one."""
    counts: dict[str, ParameterCount] = {}
    for name, parameter in model.named_parameters():
        if PEFT_ORIGINAL in name:
            continue
        number = parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)  # two 4-bit weights in a byte
        if ".pvm_block." in name:
            part = "branches"
        elif ".lora_" in name:
            part = "LoRA"
        elif ".visual." in name:
            part = "vision tower"
        else:
            part = "language model"
        for key in (part, "all"):
            count = counts.setdefault(key, ParameterCount(key, 0, 0))
            count.total += number
            count.trainable += number if parameter.requires_grad else 0
    total = counts.pop("all")
    return [*counts.values(), total]


def training_record(
    model: PreTrainedModel | PeftModel, settings: dict[str, Any], state: TrainerState
) -> dict[str, Any]:
    """
    The content of training.json, without paths of this machine.

    Args:
        settings (`dict[str, Any]`): what [`pvm.training.resume.run_settings`] returns, or at least `method`; of a
            second stage also its `stage` and the record of the `previous` one.
        state (`TrainerState`): steps, epochs and losses so far.
    """
    total = count_parameters(model)[-1]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    names = settings.get("dataset_name", [])
    weights = settings.get("dataset_weights") or [None] * len(names)
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    base, revision = settings.get("base_model"), settings.get("base_revision")
    if isinstance(model.config, Qwen3VLPVMConfig):  # training may have started from another PVM checkpoint
        base, revision = model.config.base_model_name_or_path, model.config.base_model_revision
    on_hub = base is not None and public_name(base)["on_hub"]
    stage = settings.get("stage", "sft")
    rewards = [entry["reward"] for entry in state.log_history if "reward" in entry]
    return {
        "stage": stage,
        "previous": settings.get("previous"),
        "method": settings["method"],
        "base_model": base if on_hub else None,
        "base_revision": revision if on_hub else None,
        "datasets": [{**public_name(name), "weight": weight} for name, weight in zip(names, weights)],
        "step": state.global_step,
        "steps": state.max_steps,
        "epochs": None if state.epoch is None else round(state.epoch, 3),
        "last_loss": losses[-1] if losses else None,
        "last_reward": rewards[-1] if rewards else None,
        "trained_parameters": total.trainable,
        "all_parameters": total.total,
        "arguments": {key: settings[key] for key in RECIPE if key in settings},
        "hardware": f"{settings.get('num_processes', 1)} x {device}",
        "versions": {package: version(package) for package in (*PACKAGES, *(["trl"] if stage == "grpo" else []))},
    }


def training_metadata(record: dict[str, Any]) -> dict[str, Any]:
    """What a config says about a training, of its [`training_record`]; after a second stage, about both."""
    metadata = {key: record[key] for key in ("method", "step", "base_model", "base_revision")}
    metadata["image_dropout"] = record["arguments"].get("image_dropout", 0.0)
    if record.get("stage", "sft") != "sft":  # records of release 0.1.0 do not name it
        previous = record["previous"]
        metadata |= {"stage": record["stage"], "previous": previous and training_metadata(previous)}
    return metadata


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write a [`training_record`] into the folder of a checkpoint."""
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """The content of training.json; empty if there is none."""
    file = folder / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
