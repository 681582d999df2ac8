"""Icons on crops of a photograph, four pictures in a conversation.

A picture is 32 x 32 pixels with an icon in each quarter: the backbone sees four visual tokens per icon, with parts of
the background, and has to choose the right one of four pictures. Icons are drawn at random angles, sizes, proportions,
colours and places, and their names are among the words of the filler.

Icons are glyphs of DejaVu Sans, which comes with matplotlib (free licence: LICENSE_DEJAVU there). The photographs are
scikit-learn's: china.jpg by danielbuechele for training, flower.jpg by vultilion for tests, both CC BY 2.0.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_image


GLYPHS = {
    "sun": "\u2600", "cloud": "\u2601", "star": "\u2605", "horse": "\u265e", "castle": "\u265c", "king": "\u265a",
    "music": "\u266b", "snow": "\u2744", "storm": "\u26a1", "ship": "\u2693", "moon": "\u263e", "flag": "\u2691",
    "flower": "\u2698", "coffee": "\u2615", "house": "\u2302", "engine": "\u2699",
}  # fmt: skip
KINDS = tuple(GLYPHS)  # words of the filler: one token each

PICTURES = 4
QUARTERS = 4  # of a picture: left to right, then down
PIXELS = 16  # of a quarter
GLYPH_PIXELS = 48  # before it is turned and shrunk
DRAWINGS = 100  # of each icon, in each split
PHOTOGRAPHS = {"train": "china.jpg", "test": "flower.jpg"}


@dataclass
class Icons:
    """
    drawings (`list[list[Image]]`): masks of each icon, at most 16 x 16 pixels.
    photograph (`np.ndarray` `[height, width, 3]`, uint8): the background.
    different (`int`): kinds of icons in a conversation, at most.
    """

    drawings: list[list[Image.Image]]
    photograph: np.ndarray
    different: int = len(KINDS)

    noun: ClassVar[str] = "icon"
    separator: ClassVar[str] = " "

    @classmethod
    def load(cls, split: str) -> "Icons":
        """The icons and the photograph of "train" or "test"; the two are disjoint."""
        chosen = slice(DRAWINGS) if split == "train" else slice(DRAWINGS, None)
        drawings = [draw_glyph(character, 2 * DRAWINGS)[chosen] for character in GLYPHS.values()]
        # At half size, so that a crop shows things and not a plain surface; dark, so that icons stand out.
        return cls(drawings, load_sample_image(PHOTOGRAPHS[split])[::2, ::2] // 3)

    def draw(self, rng: np.random.Generator) -> tuple[list[Image.Image], list[str]]:
        """Four random pictures (32 x 32, RGB), and the names of their icons."""
        icons = rng.choice(rng.permutation(len(KINDS))[: self.different], size=(PICTURES, QUARTERS))
        return [self._picture(four, rng) for four in icons], [KINDS[icon] for icon in icons.ravel()]

    def _picture(self, icons: np.ndarray, rng: np.random.Generator) -> Image.Image:
        height, width = self.photograph.shape[:2]
        top, left = rng.integers([height - 2 * PIXELS, width - 2 * PIXELS])
        picture = Image.fromarray(self.photograph[top : top + 2 * PIXELS, left : left + 2 * PIXELS])
        colours = rng.integers(160, 256, size=(QUARTERS, 3)).tolist()
        for quarter, (icon, colour) in enumerate(zip(icons, colours)):
            mask = self.drawings[icon][rng.integers(DRAWINGS)]
            row, column = divmod(quarter, 2)
            x, y = rng.integers([PIXELS - mask.width + 1, PIXELS - mask.height + 1]).tolist()
            picture.paste(tuple(colour), (column * PIXELS + x, row * PIXELS + y), mask)
        return picture


@cache
def draw_glyph(character: str, number: int) -> list[Image.Image]:
    """`number` different masks: the longer side is 11 to 16 pixels, and both sides are squeezed a little."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), GLYPH_PIXELS)
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
