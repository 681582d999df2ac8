"""Icons on crops of a photograph, four pictures in a conversation.

A picture is 32 x 32 pixels with an icon in each quarter: the backbone sees four visual tokens per icon, with parts of
the background, and has to choose the right one of four pictures. Icons are drawn at random angles, sizes, proportions,
colours and places.

Icons are glyphs of DejaVu Sans, which comes with matplotlib (free licence: LICENSE_DEJAVU there). The photographs are
scikit-learn's: china.jpg by danielbuechele for training, flower.jpg by vultilion for tests, both CC BY 2.0.
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_image

from pvm.worlds.language import random_contents


GLYPHS = {
    "umbrella": "\u2602", "phone": "\u260e", "clover": "\u2618", "skull": "\u2620", "radiation": "\u2622",
    "peace": "\u262e", "smile": "\u263b", "crescent": "\u263d", "queen": "\u265b", "rook": "\u265c",
    "bishop": "\u265d", "knight": "\u265e", "pawn": "\u265f", "spade": "\u2660", "club": "\u2663", "heart": "\u2665",
    "diamond": "\u2666", "tune": "\u266b", "recycle": "\u267b", "anchor": "\u2693", "swords": "\u2694",
    "scales": "\u2696", "gear": "\u2699", "bolt": "\u26a1", "scissors": "\u2702", "plane": "\u2708",
    "envelope": "\u2709", "lily": "\u269c", "check": "\u2714", "cross": "\u2716", "snowflake": "\u2744",
    "monkey": "\U0001f435",
}  # fmt: skip

PICTURES, QUARTERS = 4, 4  # of a picture: left to right, then down
PIXELS = 16  # of a quarter
GLYPH_PIXELS = 48  # before it is turned and shrunk
DRAWINGS = 100  # of each icon, in each split
PHOTOGRAPHS = {"train": "china.jpg", "test": "flower.jpg"}


@dataclass
class Icons:
    """`drawings`: masks of each icon, at most 16 x 16 pixels; `photograph` (height, width, 3) uint8."""

    drawings: dict[str, list[Image.Image]]
    photograph: np.ndarray

    noun: ClassVar[str] = "icon"
    contents: ClassVar[tuple[str, ...]] = tuple(GLYPHS)

    @classmethod
    def load(cls, split: str) -> "Icons":
        """The icons and the photograph of "train" or "test"."""
        chosen = slice(DRAWINGS) if split == "train" else slice(DRAWINGS, None)
        drawings = {name: draw_glyph(character, 2 * DRAWINGS)[chosen] for name, character in GLYPHS.items()}
        # At half size, so that a crop shows things and not a plain surface; dark, so that icons stand out.
        return cls(drawings, load_sample_image(PHOTOGRAPHS[split])[::2, ::2] // 3)

    def draw(self, rng: np.random.Generator, contents: list[str] | None = None) -> tuple[list[Image.Image], list[str]]:
        """Four pictures (32 x 32, RGB), and what is in their cells: `contents`, at random by default."""
        contents = random_contents(self, rng) if contents is None else contents
        return [self._picture(contents[k : k + QUARTERS], rng) for k in range(0, len(contents), QUARTERS)], contents

    def _picture(self, names: list[str], rng: np.random.Generator) -> Image.Image:
        height, width = self.photograph.shape[:2]
        top, left = rng.integers([height - 2 * PIXELS, width - 2 * PIXELS])
        picture = Image.fromarray(self.photograph[top : top + 2 * PIXELS, left : left + 2 * PIXELS])
        colours = rng.integers(160, 256, size=(QUARTERS, 3)).tolist()
        for quarter, (name, colour) in enumerate(zip(names, colours)):
            mask = self.drawings[name][rng.integers(DRAWINGS)]
            row, column = divmod(quarter, 2)
            x, y = rng.integers([PIXELS - mask.width + 1, PIXELS - mask.height + 1]).tolist()
            picture.paste(tuple(colour), (column * PIXELS + x, row * PIXELS + y), mask)
        return picture


@cache
def draw_glyph(character: str, number: int) -> list[Image.Image]:
    """`number` different masks: the longer side fills 13 to 16 pixels, and they may be narrower than the glyph."""
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans", fallback_to_default=False), GLYPH_PIXELS)
    glyph = Image.new("L", (3 * GLYPH_PIXELS // 2, 3 * GLYPH_PIXELS // 2))
    middle = glyph.width // 2
    ImageDraw.Draw(glyph).text((middle, middle), character, fill=255, font=font, anchor="mm")
    rng, drawings = np.random.default_rng(0), {}
    while len(drawings) < number:
        turned = glyph.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR)
        turned = turned.crop(turned.getbbox())
        scale = rng.uniform(13, 16) / max(turned.size) * rng.uniform([0.85, 0.85], 1)
        size = [max(round(side * factor), 1) for side, factor in zip(turned.size, scale)]
        drawing = turned.resize(size, Image.Resampling.BOX)
        drawings[drawing.size, drawing.tobytes()] = drawing
    return list(drawings.values())
