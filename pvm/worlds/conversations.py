"""Conversations about the pictures of a world, in which each of 16 cells shows something.

Cells have names, alpha to papa, not numbers: every digit in an answer about digits is scored.

- `cell`: after some tokens of unrelated text, "Cell golf?" -> "7". Varies the distance from the image.
- `read`: "Read alpha to papa." -> a fixed phrase for each of these cells. Varies the depth in the answer.
- `list`: as `read`, in short; only to train on.
- `name`: "Name golf." -> "golf", for which no image is needed.
"""

from typing import Protocol

import numpy as np
from PIL import Image


NAMES = tuple(
    """alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa""".split()
)
CELLS = range(len(NAMES))  # of a board row by row, of several pictures one after the other

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


class World(Protocol):
    """
    noun (`str`): what is in a cell.
    separator (`str`): between the name of a cell and what is in it.
    """

    noun: str
    separator: str

    def draw(self, rng: np.random.Generator) -> tuple[list[Image.Image], list[str]]:
        """Random pictures, and what is in each cell."""


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
    """The text that asks to repeat a name, for which no image is needed."""
    return f"Name {NAMES[cell]}."


def cell_phrase(cell: int, content: str, noun: str) -> str:
    """How a cell is read aloud: 9 tokens if it is a digit, the digit second to last."""
    return f"The {noun} in cell {NAMES[cell]} is {content}."


def texts() -> list[str]:
    """Texts with every word of the digits' world in each of its forms, to train the tokenizer on."""
    return [
        "user\nassistant\nsystem\n",
        " ".join(str(digit) for digit in range(10)),
        *(f"{word} {word}" for word in FILLER_WORDS),
        *(
            f"{cell_question(cell)} {cell_phrase(cell, '0', 'digit')} {cell_phrase(cell, '0', 'digit')}"
            for cell in CELLS
        ),
        *(f"\n{name_instruction(cell)}\n{NAMES[cell]}" for cell in CELLS),
        f"{read_instruction(0, 15)}\n{list_instruction(0, 15)}\nCells",
    ]


def filler(length: int, rng: np.random.Generator) -> str:
    """`length` random words; each is one token."""
    return " ".join(FILLER_WORDS[word] for word in rng.integers(len(FILLER_WORDS), size=length))


def _user(text: str, images: int = 0) -> dict:
    parts = [{"type": "image", "text": None} for _ in range(images)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _row(pictures: list, opening: str, turns: list[tuple[str, str]], task: str, length: int) -> dict:
    messages = []
    for turn, (question, answer) in enumerate(turns):
        user = _user(question) if turn else _user(opening + question, len(pictures))
        messages += [user, _assistant(answer)]
    return {"images": pictures, "messages": messages, "task": task, "filler": length}


def _in_words(world: World, contents: list[str], first: int, last: int) -> str:
    # 2 tokens a cell.
    return " ".join(["Cells", *(f"{NAMES[cell]}{world.separator}{contents[cell]}" for cell in range(first, last + 1))])


def _opening(world: World, length: int, is_text: bool, rng: np.random.Generator) -> tuple[list, list[str], str]:
    # Filler is between pictures and question, or before cells in words.
    pictures, contents = world.draw(rng)
    text = f"{filler(length, rng)}\n"
    if not is_text:
        return pictures, contents, text
    return [], contents, f"{text}{_in_words(world, contents, CELLS[0], CELLS[-1])}\n"


def cell_row(world: World, length: int, questions: int, rng: np.random.Generator, is_text: bool = False) -> dict:
    """
    A conversation: pictures, `length` tokens of filler, then `questions` turns about different cells. If `is_text`,
    the cells are in words, after the filler.
    """
    pictures, contents, opening = _opening(world, length, is_text, rng)
    cells = rng.permutation(len(CELLS))[:questions].tolist()
    return _row(pictures, opening, [(cell_question(cell), contents[cell]) for cell in cells], "cell", length)


def read_row(
    world: World, length: int, first: int, last: int, rng: np.random.Generator, is_text: bool = False
) -> dict:
    """As [`cell_row`], and then the cells `first` to `last` read aloud."""
    pictures, contents, opening = _opening(world, length, is_text, rng)
    answer = " ".join(cell_phrase(cell, contents[cell], world.noun) for cell in range(first, last + 1))
    return _row(pictures, opening, [(read_instruction(first, last), answer)], "read", length)


def list_row(
    world: World, length: int, first: int, last: int, rng: np.random.Generator, is_text: bool = False
) -> dict:
    """
    As [`cell_row`], and then the cells `first` to `last` in short, as "golf7 hotel3", to train on. With the content
    right after the name, one attention layer is enough to learn where cells are. The other tasks need two, and a model
    that starts with them learns it very late.
    """
    pictures, contents, opening = _opening(world, length, is_text, rng)
    answer = _in_words(world, contents, first, last)
    return _row(pictures, opening, [(list_instruction(first, last), answer)], "list", length)


def name_row(length: int, questions: int, rng: np.random.Generator, world: World | None = None) -> dict:
    """
    A conversation that needs no image: `length` tokens of filler, then `questions` names to repeat. It begins with
    pictures of `world`, if one is given.
    """
    pictures = [] if world is None else world.draw(rng)[0]
    cells = rng.permutation(len(CELLS))[:questions].tolist()
    opening = f"{filler(length, rng)}\n"
    return _row(pictures, opening, [(name_instruction(cell), NAMES[cell]) for cell in cells], "name", length)


def after_text(row: dict, length: int, rng: np.random.Generator) -> dict:
    """`row`, after `length` tokens of filler."""
    first, *later = row["messages"]
    text = {"type": "text", "text": f"{filler(length, rng)}\n"}
    return {**row, "messages": [{**first, "content": [text, *first["content"]]}, *later], "filler": length}
