"""Writes the demo's data sets: conversations about boards of handwritten digits, in splits train and test.

    python -m pvm.digits.data --output_dir data/digits
    python -m pvm.digits.data --output_dir data/digits-backbone --stage backbone

The stage `adapt` is what PVM and LoRA are trained on (some tokens between image and question) and what everything is
tested on (up to 1,024 of them). The stage `backbone` is what the backbone is trained on: images at short distances
only, and longer texts without an image (names to repeat, boards in words), so that it learns long contexts. Its rows
are in training order, in blocks of one kind: train on it with `--train_sampling_strategy sequential`.
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


TRAIN_ROWS = {"adapt": 3_360, "backbone": 24_000}
BLOCK = 16  # successive rows of one kind, a micro-batch: long and short rows together would be mostly padding
LIST_BLOCKS = 480  # at the start, so that the backbone first learns where cells are
TEST_FILLERS = (0, 64, 128, 256, 512, 1024)
TEST_QUESTIONS = 240  # per filler length, one question a conversation
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
    """A conversation to train PVM or LoRA on: at most 256 tokens of filler, and at most 8 cells read in sentences."""
    length = between(0, 256, rng)
    kind = rng.random()
    if kind < 0.4:
        return world.list_row(digits, length, *some_cells(16, rng), rng)
    if kind < 0.52:
        return world.read_row(digits, length, *some_cells(8, rng), rng)
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


def train_rows(stage: str, digits: world.Digits, number: int, rng: np.random.Generator) -> Iterator[dict]:
    """The training conversations of a stage, in order."""
    text_only = False
    for index in range(number):
        if stage == "adapt":
            yield adapt_row(digits, rng)
            continue
        block, offset = divmod(index, BLOCK)
        if offset == 0:
            text_only = block >= LIST_BLOCKS and rng.random() < 0.25
        yield backbone_row(digits, block, text_only, rng)


def test_rows(digits: world.Digits, rng: np.random.Generator, share: int = 1) -> Iterator[dict]:
    """
    The test conversations of both stages: questions at every distance, boards and parts of them read aloud. Of `share`
    4, a quarter as many.
    """
    for length in TEST_FILLERS:
        for _ in range(TEST_QUESTIONS // share):
            yield world.cell_row(digits, length, 1, rng)
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
    train, test, tested = world.Digits.load("train"), world.Digits.load("test"), len(TEST_FILLERS) * TEST_QUESTIONS
    tested += TEST_READS + TEST_SPANS
    splits = {
        "train": (number, train_rows(stage, train, number, np.random.default_rng([seed, 0]))),
        "test": (tested, test_rows(test, np.random.default_rng([seed, 1]))),
        "validation": (tested // 4, test_rows(train, np.random.default_rng([seed, 2]), share=4)),
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
