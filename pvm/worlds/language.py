"""What is said about the pictures of a world, a line of text at a time.

In each world 16 cells are shown and have names, alpha to papa. Questions are answered from the pictures,

- `cell`: after some tokens of unrelated text, "Cell golf?" -> "7". Varies the distance from the pictures;
- `read`: "Read alpha to papa." -> a sentence for each of these cells. Varies the depth in the answer;

or, as controls, from text alone,

- `name`: after as much unrelated text, "Name golf." -> "golf";
- `words`: after as much unrelated text, the same questions about cells that are given in words right before them.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image


NAMES = tuple(
    """alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa""".split()
)
CELLS = range(len(NAMES))

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
    Pictures of cells.

    noun (`str`): what is in a cell, for sentences.
    contents (`tuple[str, ...]`): what can be in a cell.
    """

    noun: str
    contents: tuple[str, ...]

    def draw(self, rng: np.random.Generator, contents: list[str] | None = None) -> tuple[list[Image.Image], list[str]]:
        """Pictures with as many cells each, and what is in the 16 cells: `contents`, at random by default."""


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
    """The text that asks to repeat a name, for which no picture is needed."""
    return f"Name {NAMES[cell]}."


def cell_sentence(cell: int, noun: str, content: str) -> str:
    """How a cell is read aloud: at most 22 tokens, of which the content is the second to last."""
    start = "Looking back at what was shown at the start of this conversation"
    return f"{start}, the {noun} in cell {NAMES[cell]} is {content}."


def in_words(contents: dict[int, str]) -> str:
    """Cells in words, 2 tokens a cell: "golf7 hotel3", "golf heart hotel queen"."""
    return " ".join(NAMES[cell] + ("" if content.isdigit() else " ") + content for cell, content in contents.items())


def caption(cells: Sequence[int]) -> str:
    """What stands before one of several pictures."""
    return f"Cells {NAMES[cells[0]]} to {NAMES[cells[-1]]}"


def texts(worlds: Sequence[type[World]]) -> list[str]:
    """Texts with every word of the worlds in each of its forms, to train the tokenizer on."""
    return [
        "user\nassistant\nsystem\n",
        *(f"{word} {word}" for word in FILLER_WORDS),
        *(f"{cell_question(cell)} {cell_question(cell)}\n{name_instruction(cell)}\n{NAMES[cell]}" for cell in CELLS),
        *(f"{content} {content}" for world in worlds for content in world.contents),
        *(f"{cell_sentence(0, world.noun, '0')} {cell_sentence(0, world.noun, '0')}" for world in worlds),
        f"{read_instruction(0, 15)}\n{list_instruction(0, 15)}\n{caption(CELLS)} {caption(CELLS)}",
    ]


def filler(length: int, rng: np.random.Generator) -> str:
    """`length` random words; each is one token."""
    return " ".join(FILLER_WORDS[word] for word in rng.integers(len(FILLER_WORDS), size=length))


def random_contents(world: World, rng: np.random.Generator, different: int | None = None) -> list[str]:
    """What is in the 16 cells: of `different` kinds at most, by default of all."""
    kinds = world.contents if different is None else rng.choice(world.contents, size=different)
    return rng.choice(kinds, size=len(CELLS)).tolist()
