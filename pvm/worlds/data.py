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
from pvm.worlds.language import CELLS, World


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

TRAIN_ROWS = {"digits": 3_360, "icons": 3_360, "backbone": 32_000}
TRAIN_DISTANCE = 256  # tokens between pictures and the end of an answer, at most
TRAIN_QUESTIONS, TURN_TOKENS = 8, 14  # about cells, in a conversation
TRAIN_SENTENCES, SENTENCE_TOKENS = 2, 22  # read aloud; one token less with an icon
PROMPT_TOKENS = 14  # between filler and answer

BLOCK = 16  # successive rows of one kind, a micro-batch: long and short rows together would be mostly padding
LIST_BLOCKS = 640  # at the start, so that the backbone first learns where cells are
SHORT_BLOCKS = 1_000  # at the start, with texts of at most 512 tokens
SHORT_TEXT, LONG_TEXT = 512, 4_352

TEST_FILLERS = (0, 64, 256, 512, 1024, 2048, 4096)
TEST_QUESTIONS = 120  # about a cell, for each length of filler
TEST_CONTROLS = 24  # of each kind, for each length of filler
TEST_READS = 48  # all cells, no filler
TEST_SPANS = 96  # cells of every number, no filler


def adapt_row(world: World, rng: np.random.Generator) -> dict:
    """A conversation to train PVM and its controls on."""
    pictures, contents = world.draw(rng)
    conversation, kind = Conversation(pictures), rng.random()
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


def picture_row(world: World, list_only: bool, rng: np.random.Generator) -> dict:
    """A conversation to train the backbone on: questions right after the pictures."""
    pictures, contents = world.draw(rng)
    conversation, kind = Conversation(pictures), rng.random()
    conversation.add_filler(int(rng.integers(17)), rng)
    if list_only or kind < 0.15:
        conversation.ask([list_turn(contents, some_cells(16, rng))])
    elif kind < 0.5:
        conversation.ask([read_turn(contents, some_cells(TRAIN_SENTENCES, rng), world.noun)])
    else:
        conversation.ask(cell_turns(contents, 4, rng))
    return conversation.row("picture")


def text_row(world: World, length: int, rng: np.random.Generator) -> dict:
    """
    A conversation to train the backbone on: `length` tokens of filler in up to four parts, each with questions that
    need no picture. Half of the rows begin with pictures, which are not asked about.
    """
    has_pictures = rng.random() < 0.5
    conversation = Conversation(world.draw(rng)[0] if has_pictures else [])
    *before, last = np.diff([0, *np.sort(rng.integers(length + 1, size=rng.integers(4))), length]).tolist()
    for part in before:
        conversation.add_filler(part, rng)
        conversation.ask(name_turns(4, rng))
    conversation.add_filler(last, rng)
    if has_pictures:
        conversation.ask(name_turns(8, rng))
        return conversation.row("text")
    contents, kind = random_contents(world, rng), rng.random()
    conversation.add_cells(contents)
    if kind < 0.25:
        conversation.ask([list_turn(contents, some_cells(16, rng))])
    elif kind < 0.5:
        conversation.ask([read_turn(contents, some_cells(16, rng), world.noun)])
    else:
        conversation.ask(cell_turns(contents, 8, rng))
    return conversation.row("text")


def random_contents(world: World, rng: np.random.Generator) -> list[str]:
    """What is in the cells, without pictures."""
    return rng.choice(world.contents, size=len(CELLS)).tolist()


def backbone_rows(worlds: list[World], number: int, rng: np.random.Generator) -> Iterator[dict]:
    """`number` conversations to train the backbone on, in order."""
    for index in range(number):
        block, offset = divmod(index, BLOCK)
        if offset == 0:
            world = worlds[block % len(worlds)]
            is_text = block >= LIST_BLOCKS and rng.random() < 0.25
            longest = LONG_TEXT if block >= SHORT_BLOCKS and rng.random() < 1 / 3 else SHORT_TEXT
            length = longest ** rng.uniform(0.5, 1)
        if is_text:
            yield text_row(world, int(length * rng.uniform(0.9, 1)), rng)
        else:
            yield picture_row(world, block < LIST_BLOCKS, rng)


def test_rows(world: World, rng: np.random.Generator, share: int = 1) -> Iterator[dict]:
    """The test conversations: questions and controls at every distance, cells read aloud. Of `share` 4, a quarter."""
    for length in TEST_FILLERS:
        for task, number in (("cell", TEST_QUESTIONS), ("name", TEST_CONTROLS), ("words", TEST_CONTROLS)):
            for _ in range(number // share):
                pictures, contents = ([], random_contents(world, rng)) if task == "words" else world.draw(rng)
                conversation = Conversation(pictures)
                conversation.add_filler(length, rng)
                if task == "words":
                    conversation.add_cells(contents)
                conversation.ask(name_turns(1, rng) if task == "name" else cell_turns(contents, 1, rng))
                yield conversation.row(task)
    for task, number in (("read", TEST_READS), ("read words", TEST_CONTROLS), ("span", TEST_SPANS)):
        for _ in range(number // share):
            pictures, contents = ([], random_contents(world, rng)) if task == "read words" else world.draw(rng)
            conversation = Conversation(pictures)
            conversation.add_filler(0, rng)
            if task == "read words":
                conversation.add_cells(contents)
            conversation.ask([read_turn(contents, some_cells(16, rng) if task == "span" else CELLS, world.noun)])
            yield conversation.row(task)


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
