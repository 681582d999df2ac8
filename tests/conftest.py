"""Fixtures; the builders behind them are in tiny.py."""

import pytest
import torch

import pvm  # noqa: F401  before transformers: makes torchvision importable where its compiled operators are missing
import tiny


torch.set_num_threads(1)


@pytest.fixture
def model():
    """A tiny PVM model in evaluation mode, gates at 1."""
    return tiny.build()
