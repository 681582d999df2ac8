"""Persistent Visual Memory for Qwen3-VL: training, evaluation, checkpoints."""

from pvm.torchvision_fallback import import_torchvision


__version__ = "0.2.0.dev0"  # the only place: pyproject.toml reads it

import_torchvision()
