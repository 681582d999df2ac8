"""Runs of train.py on twelve conversations and an untrained digits backbone, in this process."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import train


ROOT = Path(__file__).parent.parent
FLAGS = (
    *("--per_device_train_batch_size", "3", "--max_steps", "4", "--logging_steps", "1", "--warmup_steps", "0"),
    *("--learning_rate", "1e-3", "--use_cpu", "true", "--disable_tqdm", "true"),
)
PVM = ("--pvm_hidden_size", "32")


def arguments(base: Path, conversations: Path, output_dir: Path, *flags: str) -> list[str]:
    names = ("--model_name_or_path", base, "--dataset_name", conversations, "--output_dir", output_dir)
    return [*map(str, names), *FLAGS, *flags]


def run(base: Path, conversations: Path, output_dir: Path, *flags: str) -> Path:
    """One short run of train.py in this process."""
    train.main(arguments(base, conversations, output_dir, *flags))
    return output_dir


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a run saved: branches, LoRA adapters, or the whole model."""
    files = sorted([*folder.glob("*model*.safetensors"), *folder.glob("lora/*.safetensors")])
    return {name: weight for file in files for name, weight in load_file(file).items()}
