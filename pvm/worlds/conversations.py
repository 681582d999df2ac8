"""Conversations about the pictures of a world, or about text alone, as rows of a data set."""

import numpy as np
from PIL import Image

from pvm.worlds import language
from pvm.worlds.language import CELLS, NAMES


def _user(*parts: str | None) -> dict:
    """A user's turn; a part of None is an image."""
    content = [{"type": "image" if part is None else "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def _assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def some_cells(most: int, rng: np.random.Generator) -> range:
    """1 to `most` successive cells."""
    number = int(rng.integers(1, most + 1))
    first = int(rng.integers(len(CELLS) - number + 1))
    return range(first, first + number)


def cell_turns(contents: list[str], number: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions about `number` different cells."""
    cells = rng.permutation(len(CELLS))[:number].tolist()
    return [(language.cell_question(cell), contents[cell]) for cell in cells]


def read_turn(contents: list[str], cells: range, noun: str) -> tuple[str, str]:
    """Some cells read aloud."""
    sentences = (language.cell_sentence(cell, noun, contents[cell]) for cell in cells)
    return language.read_instruction(cells[0], cells[-1]), " ".join(sentences)


def list_turn(contents: list[str], cells: range) -> tuple[str, str]:
    """
    Some cells in short, to train on: with what is in a cell right after its name, one attention layer is enough to
    learn where cells are. The other tasks need two, and a model that starts with them learns it very late.
    """
    answer = language.in_words({cell: contents[cell] for cell in cells})
    return language.list_instruction(cells[0], cells[-1]), answer


def name_turns(number: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """`number` different names to repeat."""
    cells = rng.permutation(len(CELLS))[:number].tolist()
    return [(language.name_instruction(cell), NAMES[cell]) for cell in cells]


class Conversation:
    """A row in the making: what is added stands before the next question."""

    def __init__(self):
        self.pictures, self.messages = [], []
        self.waiting: list[str | None] = []  # parts of the next user turn
        self.filler = 0

    def add_pictures(self, pictures: list[Image.Image]) -> None:
        """All pictures of a world; several have a caption each."""
        self.pictures += pictures
        each = len(CELLS) // len(pictures)
        for first in range(0, len(CELLS), each):
            caption = [language.caption(CELLS[first : first + each])] if len(pictures) > 1 else []
            self.waiting += [*caption, None]

    def add_filler(self, length: int, rng: np.random.Generator) -> None:
        """`length` tokens of unrelated text."""
        self.waiting.append(f"{language.filler(length, rng)}\n")
        self.filler += length

    def add_cells(self, contents: list[str]) -> None:
        """Cells in words."""
        self.waiting.append(f"{language.in_words(dict(enumerate(contents)))}\n")

    def ask(self, turns: list[tuple[str, str]]) -> None:
        """Questions and answers, a turn each."""
        for question, answer in turns:
            self.messages += [_user(*self.waiting, question), _assistant(answer)]
            self.waiting = []

    def row(self, task: str) -> dict:
        """As a row of the data set."""
        return {"images": self.pictures, "messages": self.messages, "task": task, "filler": self.filler}
