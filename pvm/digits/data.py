"""Writes the demo's data sets: conversations about boards of handwritten digits, in splits train and test.

    python -m pvm.digits.data --output_dir data/digits
    python -m pvm.digits.data --output_dir data/digits-backbone --stage backbone

The stage `adapt` is what PVM and LoRA are trained on (some tokens between image and question) and what everything is
tested on (up to 1,024 of them). The stage `backbone` is what the backbone is trained on: images at short distance
only, and the same tasks with boards in words in longer texts, so that what fails far away is sight and not language.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from tqdm import tqdm

from . import world


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


@dataclass(frozen=True)
class Stage:
    """What the training conversations of a stage look like. Ranges include both ends."""

    train_rows: int
    filler: tuple[int, int]  # tokens between the image and the first question
    questions: int  # turns of a `cell` conversation
    read_share: float  # share of `read` conversations
    read_cells: int  # cells read aloud, at most
    list_share: float = 0.0  # share of `list` conversations
    words_share: float = 0.0  # share of conversations with the board in words
    words_filler: tuple[int, int] = (0, 0)  # tokens before such a board


STAGES = {
    "backbone": Stage(
        train_rows=28_000,
        filler=(0, 16),
        questions=4,
        read_share=0.24,
        read_cells=8,
        list_share=0.32,
        words_share=0.2,
        words_filler=(0, 256),
    ),
    "adapt": Stage(train_rows=8_000, filler=(64, 256), questions=8, read_share=0.2, read_cells=8),
}
TEST_FILLERS = (0, 64, 128, 256, 512, 1024)
TEST_QUESTIONS = 240  # per filler length, one question a conversation
TEST_READS = 64  # whole boards, no filler


def train_row(stage: Stage, digits: world.Digits, rng: np.random.Generator) -> dict:
    """One training conversation of a stage."""

    def between(ends: tuple[int, int]) -> int:
        return int(rng.integers(ends[0], ends[1] + 1))

    in_words = rng.random() < stage.words_share
    length = between(stage.words_filler if in_words else stage.filler)
    kind = rng.random()
    if kind < stage.read_share:
        # The language model knows readings of any length from boards in words; images come with short ones only.
        cells = between((1, world.SIDE**2 if in_words else stage.read_cells))
        first = between((0, world.SIDE**2 - cells))
        return world.read_row(digits, length, first, first + cells - 1, rng, in_words)
    if kind < stage.read_share + stage.list_share and not in_words:
        return world.list_row(digits, length, 8, rng)
    return world.cell_row(digits, length, stage.questions, rng, in_words)


def test_rows(digits: world.Digits, rng: np.random.Generator) -> list[Callable[[], dict]]:
    """The test conversations, the same for both stages, still to be made."""
    cells = [
        lambda length=length: world.cell_row(digits, length, 1, rng)
        for length in TEST_FILLERS
        for _ in range(TEST_QUESTIONS)
    ]
    return cells + [lambda: world.read_row(digits, 0, 0, world.SIDE**2 - 1, rng)] * TEST_READS


def write(output_dir: str | Path, stage_name: str = "adapt", seed: int = 0, train_rows: int | None = None) -> None:
    """Writes train.parquet and test.parquet into `output_dir`; the same arguments give the same rows."""
    output_dir, stage = Path(output_dir), STAGES[stage_name]
    output_dir.mkdir(parents=True, exist_ok=True)
    train_rng, test_rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    train, test = world.Digits.load("train"), world.Digits.load("test")
    splits = {
        "train": [lambda: train_row(stage, train, train_rng)] * (train_rows or stage.train_rows),
        "test": test_rows(test, test_rng),
    }
    for split, makers in splits.items():
        rows = [make() for make in tqdm(makers, desc=f"{output_dir}/{split}")]
        Dataset.from_list(rows, features=FEATURES).to_parquet(output_dir / f"{split}.parquet")


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder for train.parquet and test.parquet")
    parser.add_argument("--stage", choices=sorted(STAGES), default="adapt", help="which training conversations")
    parser.add_argument("--seed", type=int, default=0, help="the boards, texts and questions; never the digit split")
    parser.add_argument("--train_rows", type=int, default=None, help="default: what the stage's recipe needs")
    args = parser.parse_args()
    write(args.output_dir, args.stage, args.seed, args.train_rows)


if __name__ == "__main__":
    main()
