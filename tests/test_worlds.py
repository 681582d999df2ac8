"""The embedded default: its worlds, its data, and the backbone that ships."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image

from pvm.checkpoints.loading import load_checkpoint
from pvm.data.encoding import ConversationCollator, ConversationDataset
from pvm.data.sources import Conversations
from pvm.worlds import conversations, data
from pvm.worlds.backbone import build_tokenizer
from pvm.worlds.digits import PIXELS, SIDE, Digits
from pvm.worlds.icons import NAMES, Icons


BACKBONE = Path(__file__).parent.parent / "assets" / "digits-backbone"


def test_train_and_test_digits_are_disjoint():
    train, test = Digits.load("train"), Digits.load("test")
    assert len(train.images) + len(test.images) == 1797
    assert {digit.tobytes() for digit in test.images}.isdisjoint(digit.tobytes() for digit in train.images)


def test_every_word_is_one_token():
    tokenizer = build_tokenizer()
    filler = conversations.filler(50, np.random.default_rng(0))
    assert len(tokenizer(filler)["input_ids"]) == 50
    assert len(tokenizer(conversations.cell_question(3))["input_ids"]) == 3


def digits_of(board: Image.Image, unseen: Digits) -> list[str]:
    """What is in its cells, by comparison with the digits that there are."""
    cells = (
        np.asarray(board.convert("L")).reshape(SIDE, PIXELS, SIDE, PIXELS).swapaxes(1, 2).reshape(-1, PIXELS, PIXELS)
    )
    return [str(unseen.labels[(unseen.images == cell).all(axis=(1, 2))][0]) for cell in cells]


def test_the_board_shows_what_the_answer_says():
    unseen = Digits.load("test")
    row = conversations.cell_row(unseen, 5, 4, np.random.default_rng(0))
    shown = digits_of(row["images"][0], unseen)
    for question, answer in zip(row["messages"][::2], row["messages"][1::2]):
        asked = question["content"][-1]["text"].rpartition(" ")[2].rstrip("?")
        assert shown[conversations.NAMES.index(asked)] == answer["content"][0]["text"]


def test_after_a_second_board_it_is_the_one_asked_about():
    unseen = Digits.load("test")
    for row in data.test_rows("two", unseen, np.random.default_rng(0), share=24):
        parts = [[part["type"] for part in message["content"]] for message in row["messages"]]
        images = [index for index, types in enumerate(parts) if "image" in types]
        assert len(row["images"]) == len(images) == 2 and images[0] == 0
        shown = digits_of(row["images"][1], unseen)
        question, answer = (message["content"][-1]["text"] for message in row["messages"][-2:])
        if row["task"] in ("cell", "near"):
            assert answer == shown[conversations.NAMES.index(question.rpartition(" ")[2].rstrip("?"))]
        elif row["task"] == "read":
            assert answer == " ".join(map(conversations.cell_phrase, range(16), shown))


def test_icons_of_train_and_test_are_disjoint_and_where_their_names_say():
    """Pictures of one kind of icon have one name, four pictures of four icons sixteen."""
    train, test = Icons.load("train"), Icons.load("test")
    assert not np.array_equal(train.photograph, test.photograph)
    for seen, unseen in zip(train.drawings, test.drawings):
        known = {(drawing.size, drawing.tobytes()) for drawing in seen}
        assert known.isdisjoint((drawing.size, drawing.tobytes()) for drawing in unseen)
    pictures, names = test.draw(np.random.default_rng(0))
    assert len(pictures) == 4 and len(names) == 16 and set(names) <= set(NAMES)
    one, name = replace(test, different=1).draw(np.random.default_rng(0))
    assert len(set(name)) == 1
    for picture in one:
        pixels = np.asarray(picture)
        for top, left in ((0, 0), (0, 16), (16, 0), (16, 16)):
            assert pixels[top : top + 16, left : left + 16].max() >= 150, "brighter than the photograph"


def parts_of(row: dict) -> list[dict]:
    return [part for message in row["messages"] for part in message["content"]]


@pytest.mark.parametrize("world", [Digits, Icons])
def test_the_backbone_sees_long_texts_but_no_image_far_away(world):
    """Neighbours in a micro-batch are of about one length."""
    tokenizer = build_tokenizer()
    before, after = [], []
    for row in data.train_rows("long", world.load("train"), 480, np.random.default_rng(0)):
        parts = parts_of(row)
        lengths = [0 if part["text"] is None else len(tokenizer(part["text"])["input_ids"]) for part in parts]
        image = next((k for k, part in enumerate(parts) if part["type"] == "image"), len(parts))
        before.append(sum(lengths[:image]))
        after.append(sum(lengths[image:]) if row["task"] != "name" else 0)
    assert max(after) < 200 and 2_000 < max(before) <= data.LONGEST + 100
    for block in np.reshape(before, (-1, data.BLOCK)):
        assert not block.any() or block[block > 0].min() >= 0.8 * block.max() - 100


@pytest.mark.parametrize("world", [Digits, Icons])
def test_training_rows_are_near_their_image_and_some_need_none(world):
    tokenizer = build_tokenizer()
    rows = list(data.train_rows("adapt", world.load("train"), 400, np.random.default_rng(0)))
    texts = [" ".join(part["text"] or "" for part in parts_of(row)) for row in rows]
    assert max(len(tokenizer(text)["input_ids"]) for text in texts) < 480
    tasks = [row["task"] for row in rows]
    assert {"cell", "list", "read"} == set(tasks[:200]) and {"name", "cell", "list", "read"} == set(tasks[200:])
    assert 20 < tasks.count("name") < 60


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
