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
from pvm.worlds.backbone import CHAT_TEMPLATE, build_tokenizer
from pvm.worlds.digits import PIXELS, SIDE, Digits
from pvm.worlds.icons import DRAWINGS, KINDS, Icons


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
    assert set(KINDS) <= set(conversations.FILLER_WORDS)


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


@pytest.mark.parametrize("stage", ["two", "video"])
def test_after_a_second_board_it_is_the_one_asked_about(stage):
    unseen = Digits.load("test")
    for row in data.test_rows(stage, unseen, np.random.default_rng(0), share=24):
        parts = [[part["type"] for part in message["content"]] for message in row["messages"]]
        if stage == "two":
            images = [index for index, types in enumerate(parts) if "image" in types]
            assert len(row["images"]) == len(images) == 2 and images[0] == 0
            shown = digits_of(row["images"][1], unseen)
        else:
            assert row["images"] == [] and [types.count("video") for types in parts] == [1] + [0] * (len(parts) - 1)
            frames = row["videos"][0]
            before, shown = (digits_of(frame, unseen) for frame in frames[1:3])
            assert len(frames) == 4 and frames[0] is frames[1] and frames[2] is frames[3] and before != shown
        question, answer = (message["content"][-1]["text"] for message in row["messages"][-2:])
        if row["task"] in ("cell", "near"):
            assert answer == shown[conversations.NAMES.index(question.rpartition(" ")[2].rstrip("?"))]
        elif row["task"] == "read":
            assert answer == " ".join(conversations.cell_phrase(cell, shown[cell], "digit") for cell in range(16))


def test_icons_of_train_and_test_are_disjoint():
    train, test = Icons.load("train"), Icons.load("test")
    assert not np.array_equal(train.photograph, test.photograph)
    for seen, unseen in zip(train.drawings, test.drawings):
        known = {(drawing.size, drawing.tobytes()) for drawing in seen}
        assert known.isdisjoint((drawing.size, drawing.tobytes()) for drawing in unseen)


def test_icons_are_where_their_names_say():
    """Each kind is drawn as a square whose size tells it, brighter than any photograph."""
    squares = [[Image.new("L", (k + 1, k + 1), 255)] * DRAWINGS for k in range(len(KINDS))]
    pictures, names = replace(Icons.load("test"), drawings=squares).draw(np.random.default_rng(0))
    assert len(pictures) == 4 and len(names) == 16
    quarters = [np.asarray(picture).reshape(2, 16, 2, 16, 3).swapaxes(1, 2).reshape(4, -1, 3) for picture in pictures]
    areas = [(quarter.min(axis=-1) >= 160).sum() for quarter in np.concatenate(quarters)]
    assert areas == [(KINDS.index(name) + 1) ** 2 for name in names]
    assert len(set(replace(Icons.load("test"), different=1).draw(np.random.default_rng(0))[1])) == 1


def pieces(row: dict, tokenizer) -> list[int]:
    """The tokens between pictures, with those of the format, from the first to the end."""
    blank = [
        {"role": message["role"], "content": [{k: v for k, v in part.items() if v} for part in message["content"]]}
        for message in row["messages"]
    ]
    text = tokenizer.apply_chat_template(blank, chat_template=CHAT_TEMPLATE, tokenize=False)
    return [len(tokenizer(piece)["input_ids"]) for piece in text.split("<|image_pad|>")]


@pytest.mark.parametrize("world", [Digits, Icons])
def test_the_backbone_sees_long_texts_but_is_asked_about_near_images_only(world):
    """Neighbours in a micro-batch are of about one length."""
    tokenizer, lengths, after = build_tokenizer(), [], []
    for row in data.train_rows("long", world.load("train"), 320, np.random.default_rng(0)):
        tokens = pieces(row, tokenizer)
        lengths.append(sum(tokens))
        if row["task"] != "name":
            after.append(tokens[-1])
    assert max(after) < 130 and 2_000 < max(lengths) <= data.LONGEST + 130
    for block in np.reshape(lengths, (-1, data.BLOCK)):
        assert block.min() >= 0.9 * (block.max() - 130)


@pytest.mark.parametrize("world", [Digits, Icons])
def test_training_rows_are_near_their_image_and_some_need_none(world):
    tokenizer = build_tokenizer()
    rows = list(data.train_rows("adapt", world.load("train"), 400, np.random.default_rng(0)))
    assert max(pieces(row, tokenizer)[-1] for row in rows) <= 480
    tasks = [row["task"] for row in rows]
    assert {"cell", "list", "read"} == set(tasks[:200]) and {"name", "cell", "list", "read"} == set(tasks[200:])
    assert 20 < tasks.count("name") < 60


def test_icons_are_taught_one_kind_at_a_time_and_long_texts_last():
    rows = list(data.train_rows("backbone", Icons.load("train"), 400, np.random.default_rng(0)))
    kinds = [
        len({word for word in row["messages"][-1]["content"][0]["text"].split() if word in KINDS}) for row in rows
    ]
    assert set(kinds[:32]) == {1} and max(kinds[32:48]) <= 3 < max(kinds[48:120])
    assert {row["task"] for row in rows[:120]} == {"list"} and {"cell", "read"} <= {row["task"] for row in rows[120:]}
    assert max(row["filler"] for row in rows[:360]) <= 16 and max(row["filler"] for row in rows[360:]) > 500


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
