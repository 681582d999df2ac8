"""Boards of real handwritten digits, and two tasks on them.

A board is a 4 x 4 grid of 8 x 8 pixel digits (scikit-learn's 1,797), 32 x 32 pixels in all; the tiny backbone sees one
visual token per digit. Cells have names, alpha to papa, not numbers, because every digit in an answer is scored.

- `cell`: after some tokens of unrelated text, "Cell golf?" -> "7". Varies the distance from the image.
- `read`: "Read alpha to papa." -> a fixed phrase for each of these cells. Varies the depth in the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


SIDE = 4
PIXELS = 8
NAMES = tuple(
    """alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa""".split()
)
CELLS = range(SIDE * SIDE)  # row by row, named in this order
TEST_DIGITS = 360  # of 1,797
SPLIT_SEED = 0  # fixed: the same digits are held out whatever the seed of the data

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


def read_instruction(first: int, last: int) -> str:
    """The text that asks for the cells `first` to `last` (both included) in whole sentences."""
    return f"Read {NAMES[first]} to {NAMES[last]}."


def list_instruction(first: int, last: int) -> str:
    """The text that asks for the cells `first` to `last` (both included) in short."""
    return f"List {NAMES[first]} to {NAMES[last]}."


def cell_question(cell: int) -> str:
    """The question about a cell."""
    return f"Cell {NAMES[cell]}?"


def name_instruction(cell: int) -> str:
    """The text that asks to repeat a name, for which no board is needed."""
    return f"Name {NAMES[cell]}."


def cell_phrase(cell: int, digit: int) -> str:
    """How a cell is read aloud: 9 tokens, the digit second to last."""
    return f"The digit in cell {NAMES[cell]} is {digit}."


def texts() -> list[str]:
    """Texts with every word of the world in each of its forms, to train the tokenizer on."""
    return [
        "user\nassistant\nsystem\n",
        " ".join(str(digit) for digit in range(10)),
        *(f"{word} {word}" for word in FILLER_WORDS),
        *(f"{cell_question(cell)} {cell_phrase(cell, 0)} {cell_phrase(cell, 0)}" for cell in CELLS),
        *(f"\n{name_instruction(cell)}\n{NAMES[cell]}" for cell in CELLS),
        f"{read_instruction(0, 15)}\n{list_instruction(0, 15)}\nCells",
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

    def board(self, rng: np.random.Generator, cells: Sequence[int] = CELLS) -> tuple[Image.Image, dict[int, int]]:
        """A random board: its picture (32 x 32, RGB) and the labels of the given cells; the others are black."""
        labels = rng.integers(10, size=len(cells))
        picks = [rng.choice(np.flatnonzero(self.labels == label)) for label in labels]
        grid = np.zeros((SIDE * SIDE, PIXELS, PIXELS), dtype=np.uint8)
        grid[list(cells)] = self.images[picks]
        grid = grid.reshape(SIDE, SIDE, PIXELS, PIXELS).swapaxes(1, 2)
        picture = Image.fromarray(grid.reshape(SIDE * PIXELS, SIDE * PIXELS)).convert("RGB")
        return picture, dict(zip(cells, labels.tolist(), strict=True))


def filler(length: int, rng: np.random.Generator) -> str:
    """`length` random words; each is one token."""
    return " ".join(FILLER_WORDS[word] for word in rng.integers(len(FILLER_WORDS), size=length))


def _user(text: str, image: bool = False) -> dict:
    parts = [{"type": "image", "text": None}] if image else []
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def text_board(labels: dict[int, int]) -> str:
    """A board in words, 2 tokens a cell."""
    return " ".join(["Cells", *(f"{NAMES[cell]}{label}" for cell, label in labels.items())])


def _opening(
    digits: Digits, length: int, in_words: bool, rng: np.random.Generator
) -> tuple[list, dict[int, int], str]:
    # Filler is between image and question, or before a board in words.
    picture, labels = digits.board(rng)
    text = filler(length, rng)
    return ([], labels, f"{text}\n{text_board(labels)}\n") if in_words else ([picture], labels, f"{text}\n")


def cell_row(digits: Digits, length: int, questions: int, rng: np.random.Generator, in_words: bool = False) -> dict:
    """A conversation: a board, `length` tokens of filler, then `questions` turns about different cells."""
    images, labels, opening = _opening(digits, length, in_words, rng)
    messages = []
    for turn, cell in enumerate(rng.permutation(SIDE * SIDE)[:questions].tolist()):
        question = cell_question(cell)
        messages += [
            _user(question if turn else opening + question, image=turn == 0 and not in_words),
            _assistant(str(labels[cell])),
        ]
    return {"images": images, "messages": messages, "task": "cell", "filler": length}


def read_row(
    digits: Digits, length: int, first: int, last: int, rng: np.random.Generator, in_words: bool = False
) -> dict:
    """A conversation: a board, `length` tokens of filler, then the cells `first` to `last` read aloud."""
    images, labels, opening = _opening(digits, length, in_words, rng)
    answer = " ".join(cell_phrase(cell, labels[cell]) for cell in range(first, last + 1))
    messages = [_user(opening + read_instruction(first, last), image=not in_words), _assistant(answer)]
    return {"images": images, "messages": messages, "task": "read", "filler": length}


def list_row(
    digits: Digits, length: int, first: int, last: int, rng: np.random.Generator, in_words: bool = False
) -> dict:
    """
    A conversation to train on: a board, `length` tokens of filler, then the cells `first` to `last` in short, as
    "golf7 hotel3". With the digit right after the name, one attention layer is enough to learn where cells are. The
    other tasks need two, and a model that starts with them learns it very late.
    """
    images, labels, opening = _opening(digits, length, in_words, rng)
    answer = text_board({cell: labels[cell] for cell in range(first, last + 1)})
    messages = [_user(opening + list_instruction(first, last), image=not in_words), _assistant(answer)]
    return {"images": images, "messages": messages, "task": "list", "filler": length}


def name_row(length: int, questions: int, rng: np.random.Generator, digits: Digits | None = None) -> dict:
    """
    A conversation that needs no image: `length` tokens of filler, then `questions` names to repeat. It begins with a
    board of `digits`, if they are given.
    """
    images = [] if digits is None else [digits.board(rng)[0]]
    messages = []
    for turn, cell in enumerate(rng.permutation(SIDE * SIDE)[:questions].tolist()):
        opening = "" if turn else f"{filler(length, rng)}\n"
        messages += [
            _user(opening + name_instruction(cell), image=turn == 0 and bool(images)),
            _assistant(NAMES[cell]),
        ]
    return {"images": images, "messages": messages, "task": "name", "filler": length}


def after_text(row: dict, length: int, rng: np.random.Generator) -> dict:
    """`row`, after `length` tokens of filler."""
    first, *later = row["messages"]
    text = {"type": "text", "text": f"{filler(length, rng)}\n"}
    return {**row, "messages": [{**first, "content": [text, *first["content"]]}, *later], "filler": length}
