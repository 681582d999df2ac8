"""Fixtures; the builders behind them are in tiny.py."""

import pvm  # noqa: F401  first of all: makes torchvision importable where its compiled operators are missing

import pytest
import torch

import tiny


torch.set_num_threads(1)


@pytest.fixture
def model():
    """A tiny PVM model in evaluation mode, gates at 1."""
    return tiny.build()
