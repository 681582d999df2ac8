"""Writes the demo's data sets: conversations about boards of handwritten digits, in splits train and test.

    python -m pvm.digits.data --output_dir data/digits
    python -m pvm.digits.data --output_dir data/digits-two --stage two
    python -m pvm.digits.data --output_dir data/digits-backbone --stage backbone
    python -m pvm.digits.data --output_dir data/digits-long --stage long

The stage `adapt` is what PVM and its controls are trained on (some tokens between image and question; a tenth needs no
image) and what everything is tested on: up to 4,096 tokens from the image, and in answers eight times as long.
Two controls tell what is lost of language, and not of sight: questions that need no image, at the same distances, and
questions about a board right after a text as long. In the stage `two` a second board follows in the conversation, and
every question after it is about that one.

The stages `backbone` and then `long` are what the backbone is trained on: images at short distances only, and, so that
it learns long contexts, questions that need none after texts of up to 512 tokens, then of up to 4,352; these texts are
before images, too. Rows are in training order, in blocks of one kind: train on them with `--train_sampling_strategy
sequential`.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from tqdm import tqdm

from pvm.digits import world


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


TRAIN_ROWS = {"adapt": 3_360, "two": 3_360, "backbone": 24_000, "long": 1_920}
BLOCK = 16  # successive rows of one kind: long and short ones together would be mostly padding
LIST_BLOCKS = 480  # at the start, so that the backbone first learns where cells are
LONG_TEXT = 4_352
TEST_FILLERS = (0, 64, 256, 512, 1024, 2048, 4096)
TEST_QUESTIONS = 120  # about the board, per filler length, one question a conversation
TEST_CONTROLS = 24  # of each kind, per filler length
TEST_READS = 64  # whole boards, no filler
TEST_SPANS = 96  # parts of boards of every length, no filler


def between(low: int, high: int, rng: np.random.Generator) -> int:
    """A random integer, both ends included."""
    return int(rng.integers(low, high + 1))


def some_cells(most: int, rng: np.random.Generator) -> tuple[int, int]:
    """The first and the last of 1 to `most` successive cells."""
    number = between(1, most, rng)
    first = between(0, world.SIDE**2 - number, rng)
    return first, first + number - 1


def adapt_row(digits: world.Digits, rng: np.random.Generator) -> dict:
    """A conversation to train PVM or LoRA on: at most 256 tokens of filler, and at most 2 cells read in sentences."""
    length = between(0, 256, rng)
    if rng.random() < 0.1:
        return world.name_row(length, 4, rng, digits)
    kind = rng.random()
    if kind < 0.4:
        return world.list_row(digits, length, *some_cells(16, rng), rng)
    if kind < 0.52:
        return world.read_row(digits, length, *some_cells(2, rng), rng)
    return world.cell_row(digits, length, 16, rng)


def backbone_row(digits: world.Digits, block: int, text_only: bool, rng: np.random.Generator) -> dict:
    """A conversation to train the backbone on: with an image, at most 16 tokens of filler and at most 8 cells read."""
    if block < LIST_BLOCKS:
        return world.list_row(digits, between(0, 16, rng), *some_cells(16, rng), rng)
    length = between(0, 512 if text_only else 16, rng)
    kind = rng.random()
    if text_only and kind < 0.5:
        return world.name_row(length, 4, rng)
    if kind < (0.75 if text_only else 0.15):
        return world.list_row(digits, length, *some_cells(16, rng), rng, text_only)
    if rng.random() < 0.4:
        return world.read_row(digits, length, *some_cells(16 if text_only else 8, rng), rng, text_only)
    return world.cell_row(digits, length, 4, rng, text_only)


def long_row(digits: world.Digits, length: int, text_only: bool, rng: np.random.Generator) -> dict:
    """A conversation to train the backbone on last: after `length` tokens names, or a board and questions about it."""
    if text_only:
        return world.name_row(length, 8, rng, digits if rng.random() < 0.5 else None)
    return world.after_text(backbone_row(digits, LIST_BLOCKS, False, rng), length, rng)


def train_rows(stage: str, digits: world.Digits, number: int, rng: np.random.Generator) -> Iterator[dict]:
    """The training conversations of a stage, in order."""
    text_only, longest = False, 0
    for index in range(number):
        if stage in ("adapt", "two"):
            row = adapt_row(digits, rng)
            yield row if stage == "adapt" else two_row(digits, row, rng)
            continue
        block, offset = divmod(index, BLOCK)
        if stage == "backbone":
            if offset == 0:
                text_only = block >= LIST_BLOCKS and rng.random() < 0.25
            yield backbone_row(digits, block, text_only, rng)
        else:
            if offset == 0:
                text_only, longest = rng.random() < 0.5, int(LONG_TEXT ** rng.uniform(0.35, 1))
            yield long_row(digits, between(longest * 9 // 10, longest, rng), text_only, rng)


def two_row(digits: world.Digits, row: dict, rng: np.random.Generator) -> dict:
    """`row`, after one to four questions about another board."""
    before = world.cell_row(digits, 0, between(1, 4, rng), rng)
    return {**row, **{key: before[key] + row[key] for key in ("images", "messages")}}


def test_rows(stage: str, digits: world.Digits, rng: np.random.Generator, share: int = 1) -> Iterator[dict]:
    """
    The test conversations of a stage: questions at every distance, boards and parts of them read aloud. Of `share` 4,
    a quarter as many.
    """
    if stage == "two":
        yield from (two_row(digits, row, rng) for row in test_rows("adapt", digits, rng, share))
        return
    for length in TEST_FILLERS:
        for _ in range(TEST_QUESTIONS // share):
            yield world.cell_row(digits, length, 1, rng)
        for _ in range(TEST_CONTROLS // share):
            yield world.name_row(length, 1, rng, digits)
            yield {**world.after_text(world.cell_row(digits, 0, 1, rng), length, rng), "task": "near"}
    for _ in range(TEST_READS // share):
        yield world.read_row(digits, 0, 0, world.SIDE**2 - 1, rng)
    for _ in range(TEST_SPANS // share):
        yield {**world.read_row(digits, 0, *some_cells(world.SIDE**2, rng), rng), "task": "span"}


def write(output_dir: str | Path, stage: str = "adapt", seed: int = 0, number: int | None = None) -> None:
    """
    Write train.parquet (`number` rows), validation.parquet and test.parquet to `output_dir`; the same arguments give
    the same rows. Choices are made on the validation set: other boards of the training digits.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    number = TRAIN_ROWS[stage] if number is None else number
    train, test, tested = world.Digits.load("train"), world.Digits.load("test"), TEST_READS + TEST_SPANS
    tested += len(TEST_FILLERS) * (TEST_QUESTIONS + 2 * TEST_CONTROLS)
    splits = {
        "train": (number, train_rows(stage, train, number, np.random.default_rng([seed, 0]))),
        "test": (tested, test_rows(stage, test, np.random.default_rng([seed, 1]))),
        "validation": (tested // 4, test_rows(stage, train, np.random.default_rng([seed, 2]), share=4)),
    }
    for split, (total, rows) in splits.items():
        made = list(tqdm(rows, total=total, desc=f"{output_dir}/{split}"))
        Dataset.from_list(made, features=FEATURES).to_parquet(output_dir / f"{split}.parquet")


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder for train.parquet and test.parquet")
    parser.add_argument("--stage", choices=sorted(TRAIN_ROWS), default="adapt", help="which training conversations")
    parser.add_argument("--seed", type=int, default=0, help="of boards, texts and questions, not of the digit split")
    parser.add_argument("--train_rows", type=int, default=None, help="default: as many as the stage's recipe uses")
    args = parser.parse_args(arguments)
    write(args.output_dir, args.stage, args.seed, args.train_rows)


if __name__ == "__main__":
    main()
