"""Writes the data sets of the demo and the study, or what the backbone is trained on.

    python -m pvm.worlds.data --output_dir data/digits
    python -m pvm.worlds.data --rows icons --output_dir data/icons
    python -m pvm.worlds.data --rows backbone --output_dir data/backbone

`digits` and `icons` are what PVM and its controls are trained on, at most 256 tokens from the pictures, and tested on,
up to 4,096 tokens from them and in answers eight times as long. Questions that need no picture, at the same distances,
tell what of it is sight. `backbone` is both worlds at short distances only, and up to 4,096 tokens of text about which
no picture is needed. Its rows are in training order, in blocks of one kind: train on it with
`--train_sampling_strategy sequential`.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from tqdm import tqdm

from pvm.worlds.conversations import Conversation, cell_turns, list_turn, name_turns, read_turn, some_cells
from pvm.worlds.digits import Digits
from pvm.worlds.icons import Icons
from pvm.worlds.language import CELLS, World, random_contents


FEATURES = Features(
    {
        "images": List(Image()),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "task": Value("string"),
        "filler": Value("int32"),
    }
)

WORLDS = {"digits": Digits, "icons": Icons}

TRAIN_ROWS = {"digits": 3_360, "icons": 3_360, "backbone": 22_400}
TRAIN_DISTANCE = 256  # tokens between pictures and the end of an answer, at most
TRAIN_QUESTIONS, TURN_TOKENS = 8, 14  # about cells, in a conversation
TRAIN_SENTENCES, SENTENCE_TOKENS = 2, 22  # read aloud; one token less with an icon
PROMPT_TOKENS = 14  # between filler and answer

BLOCK = 16  # successive rows of one kind, a step: long and short rows together would be mostly padding
ONE_KIND_BLOCKS, FIRST_BLOCKS = 400, 800  # of [`first_row`], at the start
SHORT_TEXT, LONG_TEXT = 512, 4_352

TEST_FILLERS = (0, 64, 256, 512, 1024, 2048, 4096)
TEST_QUESTIONS = 120  # about a cell, for each length of filler
TEST_CONTROLS = 24  # of each kind, for each length of filler
TEST_READS = 48  # all cells, no filler
TEST_SPANS = 96  # cells of every number, no filler


def adapt_row(world: World, rng: np.random.Generator) -> dict:
    """A conversation to train PVM and its controls on."""
    pictures, contents = world.draw(rng)
    conversation, kind = Conversation(), rng.random()
    conversation.add_pictures(pictures)
    if kind < 0.4:
        task, turns, tokens = "list", [list_turn(contents, some_cells(16, rng))], 2 * len(CELLS)
    elif kind < 0.52:
        cells = some_cells(TRAIN_SENTENCES, rng)
        task, turns, tokens = "read", [read_turn(contents, cells, world.noun)], SENTENCE_TOKENS * TRAIN_SENTENCES
    else:
        task, turns, tokens = "cell", cell_turns(contents, TRAIN_QUESTIONS, rng), TURN_TOKENS * TRAIN_QUESTIONS
    conversation.add_filler(int(rng.integers(TRAIN_DISTANCE - PROMPT_TOKENS - tokens + 1)), rng)
    conversation.ask(turns)
    return conversation.row(task)


def first_row(world: World, different: int, in_words: bool, rng: np.random.Generator) -> dict:
    """
    A conversation to train the backbone on first. With one kind of content in all cells it learns to tell contents
    apart, with some, where cells are; with all from the start it learns neither for long.
    """
    contents = random_contents(world, rng, different)
    conversation = Conversation()
    if in_words:
        conversation.add_cells(contents)
    else:
        conversation.add_pictures(world.draw(rng, contents)[0])
    conversation.add_filler(int(rng.integers(17)), rng)
    # Of one kind, all answers after the first could be copied.
    conversation.ask([list_turn(contents, some_cells(1 if different == 1 else 16, rng))])
    return conversation.row("first")


def add_questions(
    conversation: Conversation, world: World, contents: list[str], most: int, rng: np.random.Generator
) -> None:
    """Questions of one task about cells of which at most `most` are read aloud."""
    kind = rng.random()
    if kind < 0.15:
        conversation.ask([list_turn(contents, some_cells(16, rng))])
    elif kind < 0.5:
        conversation.ask([read_turn(contents, some_cells(most, rng), world.noun)])
    else:
        conversation.ask(cell_turns(contents, 4, rng))


def picture_row(world: World, rng: np.random.Generator) -> dict:
    """A conversation to train the backbone on: questions right after the pictures."""
    pictures, contents = world.draw(rng)
    conversation = Conversation()
    conversation.add_pictures(pictures)
    conversation.add_filler(int(rng.integers(17)), rng)
    add_questions(conversation, world, contents, TRAIN_SENTENCES, rng)
    return conversation.row("picture")


def text_row(world: World, length: int, rng: np.random.Generator) -> dict:
    """
    A conversation to train the backbone on: `length` tokens of filler in up to four parts, most of them with names to
    repeat, then names again, or questions about pictures or words right before them. Half of the rows begin with other
    pictures, which are not asked about: the backbone learns to answer after a long text, not to look back over it.
    """
    conversation, looks_back = Conversation(), rng.random() < 0.5
    if looks_back:
        conversation.add_pictures(world.draw(rng)[0])
    *before, last = np.diff([0, *np.sort(rng.integers(length + 1, size=rng.integers(4))), length]).tolist()
    for part in before:
        conversation.add_filler(part, rng)
        conversation.ask(name_turns(4, rng))
    conversation.add_filler(last, rng)
    kind = rng.random()
    if kind < 1 / 3:
        conversation.ask(name_turns(8, rng))
    elif kind < 2 / 3 or looks_back:
        pictures, contents = world.draw(rng)
        conversation.add_pictures(pictures)
        add_questions(conversation, world, contents, TRAIN_SENTENCES, rng)
    else:
        contents = random_contents(world, rng)
        conversation.add_cells(contents)
        add_questions(conversation, world, contents, 16, rng)
    return conversation.row("text")


def backbone_rows(worlds: list[World], number: int, rng: np.random.Generator) -> Iterator[dict]:
    """`number` conversations to train the backbone on, in order."""
    for index in range(number):
        block, offset = divmod(index, BLOCK)
        if offset == 0:
            world, is_text = worlds[block % len(worlds)], rng.random() < 0.25
            longest = LONG_TEXT if rng.random() < 1 / 6 else SHORT_TEXT
            length = longest ** rng.uniform(0.5, 1)
        if block < FIRST_BLOCKS:
            different = 1 if block < ONE_KIND_BLOCKS else int(rng.choice([2, 4, 16]))
            yield first_row(world, different, is_text, rng)
        elif is_text:
            yield text_row(world, int(length * rng.uniform(0.9, 1)), rng)
        else:
            yield picture_row(world, rng)


def questions(world: World, task: str, filler: int, number: int, rng: np.random.Generator) -> Iterator[dict]:
    """`number` test conversations of a task, each with one question after `filler` tokens of unrelated text."""
    for _ in range(number):
        conversation = Conversation()
        if "words" in task:
            contents = random_contents(world, rng)
            conversation.add_filler(filler, rng)
            conversation.add_cells(contents)
        else:
            pictures, contents = world.draw(rng)
            conversation.add_pictures(pictures)
            conversation.add_filler(filler, rng)
        if task == "name":
            conversation.ask(name_turns(1, rng))
        elif task in ("cell", "words"):
            conversation.ask(cell_turns(contents, 1, rng))
        else:
            cells = some_cells(16, rng) if task == "span" else CELLS
            conversation.ask([read_turn(contents, cells, world.noun)])
        yield conversation.row(task)


def test_rows(world: World, rng: np.random.Generator, share: int = 1) -> Iterator[dict]:
    """The test conversations. Of `share` 4, a quarter as many."""
    for filler in TEST_FILLERS:
        for task, number in (("cell", TEST_QUESTIONS), ("name", TEST_CONTROLS), ("words", TEST_CONTROLS)):
            yield from questions(world, task, filler, number // share, rng)
    for task, number in (("read", TEST_READS), ("read words", TEST_CONTROLS), ("span", TEST_SPANS)):
        yield from questions(world, task, 0, number // share, rng)


def write(output_dir: str | Path, rows: str = "digits", seed: int = 0, number: int | None = None) -> None:
    """
    Write train.parquet (`number` rows) and, for a world, validation.parquet and test.parquet to `output_dir`; the same
    arguments give the same rows. Choices are made on the validation set: other pictures of the training objects.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    number = TRAIN_ROWS[rows] if number is None else number
    train_rng, test_rng, validation_rng = (np.random.default_rng([seed, split]) for split in range(3))
    if rows == "backbone":
        worlds = [world.load("train") for world in WORLDS.values()]
        splits = {"train": backbone_rows(worlds, number, train_rng)}
    else:
        train, test = WORLDS[rows].load("train"), WORLDS[rows].load("test")
        splits = {
            "train": (adapt_row(train, train_rng) for _ in range(number)),
            "test": test_rows(test, test_rng),
            "validation": test_rows(train, validation_rng, share=4),
        }
    for split, made in splits.items():
        made = list(tqdm(made, desc=f"{output_dir.name}/{split}", unit="row"))
        Dataset.from_list(made, features=FEATURES).to_parquet(output_dir / f"{split}.parquet")


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder for the .parquet files")
    parser.add_argument("--rows", choices=list(TRAIN_ROWS), default="digits", help="which data set")
    parser.add_argument("--seed", type=int, default=0, help="of pictures, texts and questions, not of the splits")
    parser.add_argument("--train_rows", type=int, default=None, help="default: as many as the recipes use")
    args = parser.parse_args(arguments)
    write(args.output_dir, args.rows, args.seed, args.train_rows)


if __name__ == "__main__":
    main()
