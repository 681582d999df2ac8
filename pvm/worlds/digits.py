"""Boards of real handwritten digits.

A board is a 4 x 4 grid of 8 x 8 pixel digits (scikit-learn's 1,797), 32 x 32 pixels in all; the tiny backbone sees one
visual token per digit.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


SIDE = 4
PIXELS = 8
TEST_DIGITS = 360  # of 1,797
SPLIT_SEED = 0  # fixed: the same digits are held out whatever the seed of the data


@dataclass
class Digits:
    """Handwritten digits: `images` (n, 8, 8) uint8, `labels` (n,)."""

    images: np.ndarray
    labels: np.ndarray

    noun: ClassVar[str] = "digit"
    separator: ClassVar[str] = ""

    @classmethod
    def load(cls, split: str) -> "Digits":
        """The digits of "train" or "test"; the two are disjoint."""
        bunch = load_digits()
        order = np.random.default_rng(SPLIT_SEED).permutation(len(bunch.target))
        chosen = {"train": order[TEST_DIGITS:], "test": order[:TEST_DIGITS]}[split]
        return cls((bunch.images[chosen] * (255 / 16)).round().astype(np.uint8), bunch.target[chosen])

    def draw(self, rng: np.random.Generator) -> tuple[list[Image.Image], list[str]]:
        """A random board: its picture (32 x 32, RGB), and its digits row by row."""
        labels = rng.integers(10, size=SIDE * SIDE)
        picks = [rng.choice(np.flatnonzero(self.labels == label)) for label in labels]
        grid = self.images[picks].reshape(SIDE, SIDE, PIXELS, PIXELS).swapaxes(1, 2)
        picture = Image.fromarray(grid.reshape(SIDE * PIXELS, SIDE * PIXELS)).convert("RGB")
        return [picture], [str(label) for label in labels]
