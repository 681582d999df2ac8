"""The embedded default: its world, its data, and the backbone that ships."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset

from pvm.checkpoints.loading import load_checkpoint
from pvm.data.encoding import ConversationCollator, ConversationDataset
from pvm.data.sources import Conversations
from pvm.digits import data, world
from pvm.digits.backbone import build_tokenizer


BACKBONE = Path(__file__).parent.parent / "assets" / "digits-backbone"


def test_train_and_test_digits_are_disjoint():
    train, test = world.Digits.load("train"), world.Digits.load("test")
    assert len(train.images) + len(test.images) == 1797
    assert {digit.tobytes() for digit in test.images}.isdisjoint(digit.tobytes() for digit in train.images)


def test_every_word_is_one_token():
    tokenizer = build_tokenizer()
    filler = world.filler(50, np.random.default_rng(0))
    assert len(tokenizer(filler)["input_ids"]) == 50
    assert len(tokenizer(world.cell_question(3))["input_ids"]) == 3


def test_the_board_shows_what_the_answer_says():
    digits = world.Digits.load("test")
    row = world.cell_row(digits, 5, 4, np.random.default_rng(0))
    board = np.asarray(row["images"][0].convert("L"))
    for question, answer in zip(row["messages"][::2], row["messages"][1::2]):
        asked = question["content"][-1]["text"].rpartition(" ")[2].rstrip("?")
        line, column = divmod(world.NAMES.index(asked), world.SIDE)
        top, left = line * world.PIXELS, column * world.PIXELS
        shown = board[top : top + world.PIXELS, left : left + world.PIXELS]
        matches = digits.labels[(digits.images == shown).all(axis=(1, 2))]
        assert str(matches[0]) == answer["content"][0]["text"]


def test_after_a_second_board_it_is_the_one_asked_about():
    digits = world.Digits.load("test")
    for row in data.test_rows("two", digits, np.random.default_rng(0), share=24):
        parts = [[part["type"] for part in message["content"]] for message in row["messages"]]
        images = [index for index, types in enumerate(parts) if "image" in types]
        assert len(row["images"]) == len(images) == 2 and images[0] == 0
        board = np.asarray(row["images"][1].convert("L"))
        shown = board.reshape(4, 8, 4, 8).swapaxes(1, 2).reshape(16, 8, 8)
        labels = [digits.labels[(digits.images == cell).all(axis=(1, 2))][0] for cell in shown]
        question, answer = (message["content"][-1]["text"] for message in row["messages"][-2:])
        if row["task"] == "cell":
            assert answer == str(labels[world.NAMES.index(question.rpartition(" ")[2].rstrip("?"))])
        elif row["task"] == "read":
            assert answer == " ".join(world.cell_phrase(cell, labels[cell]) for cell in range(16))


def test_the_backbone_sees_long_texts_but_no_image_far_away():
    """Neighbours in a micro-batch are of about one length."""
    tokenizer, digits = build_tokenizer(), world.Digits.load("train")
    before, after = [], []
    for row in data.train_rows("long", digits, 480, np.random.default_rng(0)):
        parts = [part for message in row["messages"] for part in message["content"]]
        lengths = [0 if part["text"] is None else len(tokenizer(part["text"])["input_ids"]) for part in parts]
        image = next((k for k, part in enumerate(parts) if part["type"] == "image"), len(parts))
        before.append(sum(lengths[:image]))
        after.append(sum(lengths[image:]) if row["task"] != "name" else 0)
    assert max(after) < 200 and 2_000 < max(before) <= data.LONG_TEXT + 100
    for block in np.reshape(before, (-1, data.BLOCK)):
        assert block[block > 0].min() >= 0.8 * block.max() - 100


def test_training_rows_are_near_their_image_and_some_need_none():
    tokenizer, digits = build_tokenizer(), world.Digits.load("train")
    rows = list(data.train_rows("adapt", digits, 400, np.random.default_rng(0)))
    texts = [" ".join(part["text"] or "" for turn in row["messages"] for part in turn["content"]) for row in rows]
    assert max(len(tokenizer(text)["input_ids"]) for text in texts) < 480
    tasks = [row["task"] for row in rows]
    assert {"name", "cell", "list", "read"} == set(tasks) and 0.05 < tasks.count("name") / 400 < 0.15


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    data.write(folder / "a", "adapt", seed=3, number=20)
    data.write(folder / "b", "adapt", seed=3, number=20)
    return folder


def test_the_same_seed_gives_the_same_data(folder):
    for split in ("train", "test", "validation"):
        first, second = ((folder / name / f"{split}.parquet").read_bytes() for name in "ab")
        assert first == second


def test_the_backbone_that_ships_sees_and_forgets(folder):
    """It reads a cell right after the image, and no longer after 1,024 tokens: what the demo starts from."""
    checkpoint = load_checkpoint(str(BACKBONE))
    rows = load_dataset(str(folder / "a"), split="test")
    accuracy = {}
    for filler in (0, 1024):
        chosen = rows.filter(lambda row, filler=filler: row["task"] == "cell" and row["filler"] == filler)
        chosen = chosen.select(range(48))
        prompts = ConversationDataset(Conversations("digits", chosen), checkpoint.processor, prompt_only=True)
        collator = ConversationCollator(checkpoint.processor.tokenizer.pad_token_id, "left")
        batch = collator([prompts[index] for index in range(len(chosen))])
        with torch.no_grad():
            answers = checkpoint.model(**batch, logits_to_keep=1).logits[:, -1].argmax(-1)
        texts = checkpoint.processor.tokenizer.batch_decode(answers[:, None])
        expected = [row["messages"][-1]["content"][0]["text"] for row in chosen]
        accuracy[filler] = sum(text == wanted for text, wanted in zip(texts, expected)) / len(expected)
    assert accuracy[0] > 0.9 and accuracy[1024] < 0.4
