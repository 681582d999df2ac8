"""Fixtures; the builders behind them are in tiny.py."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import pvm  # noqa: F401  before transformers: makes torchvision importable where its compiled operators are missing
import tiny
from pvm.worlds.backbone import build_backbone


torch.set_num_threads(1)


@pytest.fixture
def model():
    """A tiny PVM model in evaluation mode, gates at 1."""
    return tiny.build()


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """An untrained digits backbone with its processor."""
    folder = tmp_path_factory.mktemp("base")
    model, processor = build_backbone()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> Path:
    """Twelve conversations in a JSON Lines file beside their images; two of them have no image."""
    folder = tmp_path_factory.mktemp("conversations")
    with open(folder / "data.jsonl", "w") as file:
        for index in range(12):
            images = []
            if index % 6 != 5:
                Image.new("RGB", (32, 32), (20 * index, 100, 50)).save(folder / f"{index}.png")
                images = [f"{index}.png"]
            messages = [
                {"role": "user", "content": "Cell first alpha?"},
                {"role": "assistant", "content": str(index % 10)},
                {"role": "user", "content": "Cell second bravo?"},
                {"role": "assistant", "content": str((index + 3) % 10)},
            ]
            file.write(json.dumps({"images": images, "messages": messages}) + "\n")
    return folder / "data.jsonl"
