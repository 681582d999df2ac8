"""Boards of real handwritten digits, and two tasks on them.

A board is a 4 x 4 grid of 8 x 8 pixel digits (scikit-learn's 1,797), 32 x 32 pixels in all; the tiny backbone sees one
visual token per digit. Cells are named by a row and a column word, so that every digit in an answer is a scored piece.

- `cell`: after some tokens of unrelated text, "Cell second bravo?" -> "7". The axis is the distance from the image.
- `read`: "Read first to fourth." -> the rows are read aloud, a fixed phrase per cell. The axis is the depth of the answer.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


SIDE = 4
PIXELS = 8
ROWS = ("first", "second", "third", "fourth")
COLUMNS = ("alpha", "bravo", "charlie", "delta")
TEST_DIGITS = 360  # of 1,797
SPLIT_SEED = 0  # the split is part of the world: the same digits are held out at every seed

FILLER_WORDS = tuple(
    """apple barn bell bird boat book bread bridge brook candle castle chair cheese church cloud coast coffee copper
    corn cotton cup dance desert door dream dust eagle east engine farm feather fence field fire fish flag flower fog
    forest fox garden gate glass gold grain grass green harbor hat hill honey horse house ice ink iron island ivy jar
    journey kettle key king kite lake lamp lantern leaf lemon light linen lion map maple market meadow milk mill mirror
    moon moss mountain music needle nest night north oak ocean old olive orchard owl paper path pearl pepper piano pine
    plain plum pond poplar quiet quill rain raven red reed ribbon river road robin rock roof rope rose sail salt sand
    school sea shadow sheep ship silk silver sky slow smoke snow song south spring star stone storm stove street sugar
    summer sun swan table tea tent thunder tide timber tower town train tree valley velvet village violin wagon wall
    water wave west wheat wheel wide willow wind window winter wolf wood wool yard yellow young""".split()
)


def read_instruction(first_row: int, last_row: int) -> str:
    """The text that asks for rows `first_row` to `last_row` (both included, counted from 0)."""
    return f"Read {ROWS[first_row]} to {ROWS[last_row]}."


def cell_question(cell: int) -> str:
    """The question about a cell (counted row by row from 0)."""
    return f"Cell {ROWS[cell // SIDE]} {COLUMNS[cell % SIDE]}?"


def cell_phrase(cell: int, digit: int) -> str:
    """How a cell is announced when a board is read aloud: 11 tokens, the last but one is the digit."""
    return f"The cell at {ROWS[cell // SIDE]} {COLUMNS[cell % SIDE]} shows the digit {digit}."


def texts() -> list[str]:
    """Texts that hold every word of the world in every form it takes; the tokenizer is made from them."""
    cells = range(SIDE * SIDE)
    return [
        "user\nassistant\nsystem\n",
        " ".join(str(digit) for digit in range(10)),
        *(f"{word} {word}" for word in FILLER_WORDS),
        *(cell_question(cell) for cell in cells),
        *(f"{cell_phrase(cell, 0)} {cell_phrase(cell, 0)}" for cell in cells),
        *(read_instruction(first, last) for first in range(SIDE) for last in range(SIDE)),
    ]


@dataclass
class Digits:
    """Handwritten digits: `images` (n, 8, 8) uint8, `labels` (n,)."""

    images: np.ndarray
    labels: np.ndarray

    @classmethod
    def load(cls, split: str) -> "Digits":
        """The digits of "train" or "test"; the two are disjoint."""
        bunch = load_digits()
        order = np.random.default_rng(SPLIT_SEED).permutation(len(bunch.target))
        chosen = {"train": order[TEST_DIGITS:], "test": order[:TEST_DIGITS]}[split]
        return cls((bunch.images[chosen] * (255 / 16)).round().astype(np.uint8), bunch.target[chosen])

    def board(self, rng: np.random.Generator, filled: int = SIDE * SIDE) -> tuple[Image.Image, dict[int, int]]:
        """A random board: its picture (32 x 32, RGB) and {cell: label} of its `filled` cells; the others are black."""
        cells = np.sort(rng.permutation(SIDE * SIDE)[:filled])
        labels = rng.integers(10, size=filled)
        picks = [rng.choice(np.flatnonzero(self.labels == label)) for label in labels]
        grid = np.zeros((SIDE * SIDE, PIXELS, PIXELS), dtype=np.uint8)
        grid[cells] = self.images[picks]
        grid = grid.reshape(SIDE, SIDE, PIXELS, PIXELS).swapaxes(1, 2)
        picture = Image.fromarray(grid.reshape(SIDE * PIXELS, SIDE * PIXELS)).convert("RGB")
        return picture, dict(zip(cells.tolist(), labels.tolist(), strict=True))


def filler(length: int, rng: np.random.Generator) -> str:
    """`length` random words; each is one token."""
    return " ".join(rng.choice(FILLER_WORDS, size=length))


def _user(text: str, image: bool = False) -> dict:
    parts = [{"type": "image", "text": None}] if image else []
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def cell_row(digits: Digits, length: int, questions: int, rng: np.random.Generator, filled: int = SIDE * SIDE) -> dict:
    """A conversation: a board, `length` tokens of filler, then up to `questions` turns about different filled cells."""
    picture, labels = digits.board(rng, filled)
    messages = []
    for turn, cell in enumerate(rng.permutation(list(labels))[:questions].tolist()):
        question = cell_question(cell)
        if turn == 0:
            question = f"{filler(length, rng)}\n{question}"
        messages += [_user(question, image=turn == 0), _assistant(str(labels[cell]))]
    return {"images": [picture], "messages": messages, "task": "cell", "filler": length}


def read_row(digits: Digits, length: int, first_row: int, last_row: int, rng: np.random.Generator) -> dict:
    """A conversation: a board, `length` tokens of filler, then the rows `first_row` to `last_row` read aloud."""
    picture, labels = digits.board(rng)
    cells = range(first_row * SIDE, (last_row + 1) * SIDE)
    answer = " ".join(cell_phrase(cell, labels[cell]) for cell in cells)
    question = f"{filler(length, rng)}\n{read_instruction(first_row, last_row)}"
    return {
        "images": [picture],
        "messages": [_user(question, image=True), _assistant(answer)],
        "task": "read",
        "filler": length,
    }
