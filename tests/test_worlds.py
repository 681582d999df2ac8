"""The embedded default: its worlds, their data, and the backbone that ships."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from pvm.checkpoints.loading import load_checkpoint
from pvm.data.encoding import IGNORE_INDEX, ConversationCollator, ConversationDataset
from pvm.data.sources import Conversations
from pvm.worlds import data, language
from pvm.worlds.backbone import build_processor
from pvm.worlds.digits import PIXELS, SIDE, Digits
from pvm.worlds.icons import DRAWINGS, GLYPHS, Icons


BACKBONE = Path(__file__).parent.parent / "assets" / "digits-backbone"


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module", params=data.WORLDS)
def world(request):
    return data.WORLDS[request.param].load("train")


def encode(rows: list[dict], processor, **options) -> ConversationDataset:
    return ConversationDataset(
        Conversations("rows", Dataset.from_list(rows, features=data.FEATURES)), processor, **options
    )


def test_train_and_test_objects_are_disjoint():
    train, test = Digits.load("train"), Digits.load("test")
    assert len(train.images) + len(test.images) == 1797
    assert {digit.tobytes() for digit in test.images}.isdisjoint(digit.tobytes() for digit in train.images)
    train, test = Icons.load("train"), Icons.load("test")
    for name in GLYPHS:
        drawings = ([(drawing.size, drawing.tobytes()) for drawing in split.drawings[name]] for split in (train, test))
        first, second = map(set, drawings)
        assert first.isdisjoint(second) and len(first) == len(second) == DRAWINGS
    assert train.photograph.shape == test.photograph.shape and (train.photograph != test.photograph).any()


def test_every_word_is_one_token(processor, world):
    tokens = processor.tokenizer.tokenize
    assert len(tokens(language.filler(50, np.random.default_rng(0)))) == 50
    for content in world.contents:
        assert len(tokens(content)) == 1
        assert len(tokens(language.in_words(dict.fromkeys(language.CELLS, content)))) == 32
        assert len(tokens(language.cell_sentence(6, world.noun, content))) in (
            data.SENTENCE_TOKENS,
            data.SENTENCE_TOKENS - 1,
        )
    assert len(tokens(language.cell_question(3))) == 3


def test_the_board_shows_what_the_answer_says():
    digits = Digits.load("test")
    (board,), contents = digits.draw(np.random.default_rng(0))
    board = np.asarray(board.convert("L"))
    for cell, content in enumerate(contents):
        top, left = (PIXELS * place for place in divmod(cell, SIDE))
        shown = board[top : top + PIXELS, left : left + PIXELS]
        assert content in digits.labels[(digits.images == shown).all(axis=(1, 2))].astype(str)


def test_the_pictures_show_what_the_answer_says():
    """With one drawing of each icon on a black ground, a quarter has as many pixels of it as the drawing."""
    icons = Icons.load("test")
    icons.drawings = {name: drawings[:1] * len(drawings) for name, drawings in icons.drawings.items()}
    icons.photograph[:] = 0
    pictures, contents = icons.draw(np.random.default_rng(0))
    quarters = [
        np.asarray(picture)[top : top + 16, left : left + 16].max(axis=-1) > 0
        for picture in pictures
        for top in (0, 16)
        for left in (0, 16)
    ]
    shown = [int(quarter.sum()) for quarter in quarters]
    assert shown == [int((np.asarray(icons.drawings[name][0]) > 0).sum()) for name in contents]


def test_training_answers_end_within_256_tokens_of_the_pictures(processor, world):
    rng = np.random.default_rng(0)
    farthest = 0
    for example in map(encode([data.adapt_row(world, rng) for _ in range(60)], processor).__getitem__, range(60)):
        last_picture = int((example["mm_token_type_ids"] > 0).nonzero()[-1])
        last_label = int((example["labels"] != IGNORE_INDEX).nonzero()[-1])
        farthest = max(farthest, last_label - last_picture)
    assert 200 < farthest <= data.TRAIN_DISTANCE


def test_the_backbone_is_asked_about_pictures_at_short_distances_only(processor, world):
    rng = np.random.default_rng(0)
    rows = [data.picture_row(world, rng) for _ in range(30)]
    rows += [row for row in (data.text_row(world, 200, rng) for _ in range(60)) if row["images"]]
    for row, example in zip(rows, map(encode(rows, processor).__getitem__, range(len(rows)))):
        last_question = row["messages"][-2]["content"][-1]["text"]
        if not last_question.startswith("Name "):
            last_picture = int((example["mm_token_type_ids"] > 0).nonzero()[-1])
            assert int((example["labels"] != IGNORE_INDEX).nonzero()[-1]) - last_picture < 100


def test_distances_and_lengths_of_the_test_set(processor, world):
    rows = list(data.test_rows(world, np.random.default_rng(0), share=24))
    questions = encode(rows, processor, prompt_only=True)
    for row, example in zip(rows, map(questions.__getitem__, range(len(rows)))):
        assert ("words" in row["task"]) == (not row["images"])
        if row["task"] in ("cell", "name"):
            distance = len(example["input_ids"]) - 1 - int((example["mm_token_type_ids"] > 0).nonzero()[-1])
            assert 0 <= distance - row["filler"] <= data.PROMPT_TOKENS
        if row["task"] in ("read", "read words"):
            answer = processor.tokenizer.tokenize(row["messages"][-1]["content"][0]["text"])
            longest = data.TRAIN_SENTENCES * (data.SENTENCE_TOKENS - (world.noun == "icon"))
            assert len(answer) == 8 * longest
    assert {row["filler"] for row in rows if row["task"] == "cell"} == set(data.TEST_FILLERS)


@pytest.mark.parametrize("rows", data.TRAIN_ROWS)
def test_the_same_seed_gives_the_same_data(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TEST_QUESTIONS", 4)
    for folder in "ab":
        data.main(["--output_dir", str(tmp_path / folder), "--rows", rows, "--train_rows", "20", "--seed", "3"])
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == (
        ["train.parquet"] if rows == "backbone" else [f"{split}.parquet" for split in ("test", "train", "validation")]
    )
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.fixture(scope="module")
def backbone():
    return load_checkpoint(str(BACKBONE))


@pytest.mark.parametrize(
    ("task", "filler", "least", "most"),
    [("cell", 0, 0.9, 1), ("cell", 1024, 0, 0.4), ("name", 4096, 0.95, 1), ("words", 4096, 0.95, 1)],
)
def test_the_backbone_that_ships_sees_and_forgets_pictures_only(backbone, world, task, filler, least, most):
    """What the demo and the study start from."""
    number = 20 if filler == 4096 else 48
    rows = list(data.questions(world, task, filler, number, np.random.default_rng(0)))
    prompts = encode(rows, backbone.processor, prompt_only=True)
    tokenizer, correct = backbone.processor.tokenizer, 0
    collate = ConversationCollator(tokenizer.pad_token_id, "left")
    for start in range(0, number, 4):
        batch = collate([prompts[index] for index in range(start, start + 4)])
        with torch.no_grad():
            answers = backbone.model(**batch, logits_to_keep=1).logits[:, -1].argmax(-1)
        for answer, row in zip(tokenizer.batch_decode(answers[:, None]), rows[start : start + 4]):
            correct += answer == row["messages"][-1]["content"][0]["text"]
    assert least <= correct / number <= most
