"""Writes the data sets of the demo and the study: conversations about the pictures of a world.

    python -m pvm.worlds.data --output_dir data/digits
    python -m pvm.worlds.data --output_dir data/icons --world icons --train_rows 8400
    python -m pvm.worlds.data --output_dir data/digits-two --stage two
    python -m pvm.worlds.data --output_dir data/digits-video --stage video

The stage `adapt` is what PVM and its controls are trained on (some tokens between image and question; a fifth of the
second half needs no image) and what everything is tested on: up to 4,096 tokens from the image, and in answers eight
times as long. Two controls separate losing language from losing sight: questions that need no image, at the same
distances, and questions about an image right after a text as long. In the stage `two` another image follows in the
conversation, and every question after it is about that one. In the stage `video` both are in one video, a second each.

The stages `backbone` and then `long` are what the backbone is trained on. It is asked about near images only, and, so
that it learns long contexts, about none after texts of up to 512 tokens, then of up to 4,352; the same texts also come
before images. Icons start from the backbone of digits; their stage `backbone` ends with long texts.

Rows are in training order: train on them with `--train_sampling_strategy sequential`.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from tqdm import tqdm

from pvm.worlds.conversations import CELLS, World, after_text, cell_row, list_row, name_row, read_row
from pvm.worlds.digits import Digits
from pvm.worlds.icons import Icons


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
TRAIN_ROWS = {"adapt": 3_360, "two": 3_360, "video": 3_360, "backbone": 24_000, "long": 1_920}
NAME_SHARE = 0.2  # of rows in the second half: from the start, branches need more steps to learn where cells are
BLOCK = 16  # successive rows of one kind: long and short ones together would be mostly padding
LONGEST = 4_352  # tokens of text before the question
SHORT_EXPONENT = 0.35  # lengths of long texts are log-uniform between LONGEST to this power and LONGEST
TEST_FILLERS = (0, 64, 256, 512, 1024, 2048, 4096)
TEST_QUESTIONS = 120  # about a cell, per filler length, one question a conversation
TEST_CONTROLS = 24  # of each kind, per filler length
TEST_READS = 64  # all cells, no filler
TEST_SPANS = 96  # cells of every number, no filler


def between(low: int, high: int, rng: np.random.Generator) -> int:
    """A random integer, both ends included."""
    return int(rng.integers(low, high + 1))


def some_cells(most: int, rng: np.random.Generator) -> tuple[int, int]:
    """The first and the last of 1 to `most` successive cells."""
    number = between(1, most, rng)
    first = between(0, len(CELLS) - number, rng)
    return first, first + number - 1


def adapt_row(world: World, rng: np.random.Generator) -> dict:
    """A conversation to train PVM or LoRA on: at most 256 tokens of filler, and at most 2 cells read in sentences."""
    length, kind = between(0, 256, rng), rng.random()
    if kind < 0.4:
        return list_row(world, length, *some_cells(len(CELLS), rng), rng)
    if kind < 0.52:
        return read_row(world, length, *some_cells(2, rng), rng)
    return cell_row(world, length, len(CELLS), rng)


def two_row(world: World, row: dict, rng: np.random.Generator) -> dict:
    """`row`, after one to four questions about other pictures."""
    before = cell_row(world, 0, between(1, 4, rng), rng)
    return {**row, **{key: before[key] + row[key] for key in ("images", "messages")}}


def video_row(world: World, row: dict, rng: np.random.Generator) -> dict:
    """`row`, with its picture at the end of a video that showed another one before, each in two frames: a second."""
    frames = [picture for picture in (*world.draw(rng)[0], *row["images"]) for _ in range(2)]
    question, *later = row["messages"]
    parts = [{**part, "type": part["type"].replace("image", "video")} for part in question["content"]]
    messages = [{**question, "content": parts}, *later]
    return {**row, "images": [], "videos": [frames], "messages": messages}


SECOND = {"two": two_row, "video": video_row}  # stages whose rows are about the second of two pictures


def backbone_row(world: World, rng: np.random.Generator, is_text: bool = False) -> dict:
    """
    A conversation to train the backbone on: with an image, at most 16 tokens of filler and at most 8 cells read; if
    `is_text`, without one, and more of both.
    """
    length = between(0, 512 if is_text else 16, rng)
    kind = rng.random()
    if is_text and kind < 0.5:
        return name_row(length, 4, rng)
    if kind < (0.75 if is_text else 0.15):
        return list_row(world, length, *some_cells(len(CELLS), rng), rng, is_text)
    if rng.random() < 0.4:
        return read_row(world, length, *some_cells(len(CELLS) if is_text else 8, rng), rng, is_text)
    return cell_row(world, length, 4, rng, is_text)


def digits_rows(world: World, number: int, rng: np.random.Generator) -> Iterator[dict]:
    """What a new backbone is trained on. Only lists at first, until it has learned where cells are."""
    is_text = False
    for index in range(number):
        if index < 0.32 * number:
            yield list_row(world, between(0, 16, rng), *some_cells(len(CELLS), rng), rng)
            continue
        if index % BLOCK == 0:
            is_text = rng.random() < 0.25
        yield backbone_row(world, rng, is_text)


def icons_rows(world: Icons, number: int, rng: np.random.Generator) -> Iterator[dict]:
    """
    What the backbone of digits, which knows language, is trained on. With one kind of icon in a conversation it
    learns what icons are, with three kinds where they are; with all kinds from the start it learns neither.
    """
    one, three, lists, near = (int(share * number) for share in (0.08, 0.12, 0.3, 0.9))
    for index in range(near):
        if index < one:
            yield list_row(replace(world, different=1), between(0, 16, rng), *some_cells(1, rng), rng)
        elif index < lists:
            some = replace(world, different=3) if index < three else world
            yield list_row(some, between(0, 16, rng), *some_cells(len(CELLS), rng), rng)
        else:
            yield backbone_row(world, rng)
    yield from long_rows(world, number - near, 0.25, rng)


def long_rows(world: World, number: int, text_share: float, rng: np.random.Generator) -> Iterator[dict]:
    """What a backbone is trained on last: after a long text names, or an image, in blocks of about one length."""
    is_text, longest = False, 0
    for index in range(number):
        if index % BLOCK == 0:
            is_text, longest = rng.random() < text_share, int(LONGEST ** rng.uniform(SHORT_EXPONENT, 1))
        length = between(longest * 9 // 10, longest, rng)
        if is_text:
            yield name_row(length, 8, rng, world if rng.random() < 0.5 else None)
        else:
            yield after_text(backbone_row(world, rng), length, rng)


def train_rows(stage: str, world: World, number: int, rng: np.random.Generator) -> Iterator[dict]:
    """The training conversations of a stage, in order."""
    if stage == "backbone":
        yield from (icons_rows if isinstance(world, Icons) else digits_rows)(world, number, rng)
    elif stage == "long":
        yield from long_rows(world, number, 0.5, rng)
    else:
        for index in range(number):
            needs_image = 2 * index < number or rng.random() >= NAME_SHARE
            row = adapt_row(world, rng) if needs_image else name_row(between(0, 256, rng), 4, rng, world)
            yield SECOND[stage](world, row, rng) if stage in SECOND else row


def test_rows(stage: str, world: World, rng: np.random.Generator, share: int = 1) -> Iterator[dict]:
    """
    The test conversations of a stage: questions at every distance, cells of every number read aloud. Of `share` 4, a
    quarter as many.
    """
    if stage in SECOND:
        yield from (SECOND[stage](world, row, rng) for row in test_rows("adapt", world, rng, share))
        return
    for length in TEST_FILLERS:
        for _ in range(TEST_QUESTIONS // share):
            yield cell_row(world, length, 1, rng)
        for _ in range(TEST_CONTROLS // share):
            yield name_row(length, 1, rng, world)
        for _ in range(TEST_CONTROLS // share):
            yield {**after_text(cell_row(world, 0, 1, rng), length, rng), "task": "near"}
    for _ in range(TEST_READS // share):
        yield read_row(world, 0, CELLS[0], CELLS[-1], rng)
    for _ in range(TEST_SPANS // share):
        yield {**read_row(world, 0, *some_cells(len(CELLS), rng), rng), "task": "span"}


def write(
    output_dir: str | Path, stage: str = "adapt", seed: int = 0, number: int | None = None, world: str = "digits"
) -> None:
    """
    Write train.parquet (`number` rows), validation.parquet and test.parquet to `output_dir`; the same arguments give
    the same rows. Choices are made on the validation set: other pictures of what the training set shows.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    number = TRAIN_ROWS[stage] if number is None else number
    train, test, tested = WORLDS[world].load("train"), WORLDS[world].load("test"), TEST_READS + TEST_SPANS
    tested += len(TEST_FILLERS) * (TEST_QUESTIONS + 2 * TEST_CONTROLS)
    splits = {
        "train": (number, train_rows(stage, train, number, np.random.default_rng([seed, 0]))),
        "test": (tested, test_rows(stage, test, np.random.default_rng([seed, 1]))),
        "validation": (tested // 4, test_rows(stage, train, np.random.default_rng([seed, 2]), share=4)),
    }
    features = Features({**FEATURES, "videos": List(List(Image()))}) if stage == "video" else FEATURES
    for split, (total, rows) in splits.items():
        made = list(tqdm(rows, total=total, desc=f"{output_dir}/{split}"))
        Dataset.from_list(made, features=features).to_parquet(output_dir / f"{split}.parquet")


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--output_dir", required=True, help="folder for train.parquet, validation.parquet and test.parquet"
    )
    parser.add_argument("--world", choices=sorted(WORLDS), default="digits", help="what the pictures show")
    parser.add_argument("--stage", choices=sorted(TRAIN_ROWS), default="adapt", help="which training conversations")
    parser.add_argument(
        "--seed", type=int, default=0, help="of pictures, texts and questions, not of what is held out"
    )
    parser.add_argument("--train_rows", type=int, default=None, help="default: as many as the recipe of digits uses")
    args = parser.parse_args(arguments)
    write(args.output_dir, args.stage, args.seed, args.train_rows, args.world)


if __name__ == "__main__":
    main()
