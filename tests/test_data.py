"""From rows of every supported form to batches: read, refused, checked, mixed and streamed."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value, Video
from datasets import Image as DatasetImage
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoProcessor

from pvm import train
from pvm.data import media as media_files
from pvm.data import streams, validation
from pvm.data.encoding import ConversationCollator, ConversationDataset, ConversationEncoder, content_digest
from pvm.data.forms import Conversation, to_conversation
from pvm.data.sources import Conversations, DataArguments, Mixture, load_conversations
from pvm.data.streams import ConversationStream, load_streams, read_streams
from pvm.data.validation import check_rows, load_training_data
from pvm.errors import SetupError, UserError
from pvm.evaluation.questions import Prompts, read_questions
from pvm.training.trainer import PVMTrainingArguments
from qwen3vl_real import CHAT_TEMPLATES


BACKBONE = Path(__file__).parents[1] / "assets" / "digits-backbone"
QWEN3_VL_TEMPLATE = (CHAT_TEMPLATES / "qwen3_vl.jinja").read_text()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(BACKBONE)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Tests do not share a cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """0.png to 3.png (32 x 32: 16 tokens), clip.mp4 (3 s at 8 frames a second), broken.png and broken.mp4."""
    av = pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("media")
    for index in range(4):
        Image.new("RGB", (32, 32), (60 * index, 100, 50)).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / "broken.mp4").write_bytes(b"no video")
    with av.open(folder / "clip.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for brightness in range(0, 240, 10):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), brightness, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return folder


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def write(folder: Path, name: str, rows: Sequence[dict]) -> str:
    """Write a data file into a folder and return its path."""
    content = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(content)
    return str(folder / name)


def rows_of(count: int, images: bool = True) -> list[dict]:
    rows = [{"messages": [user("Cell alpha?"), assistant(str(index % 10))]} for index in range(count)]
    return [{"images": [f"{index % 4}.png"] if images else [], **row} for index, row in enumerate(rows)]


def answers(name: str, split: str = "train") -> list[str]:
    """The answers in a data set."""
    return [row.messages[-1]["content"][0]["text"] for row in load_conversations(name, split)]


def streamed(*names: str, reader: int = 0, readers: int = 1, seed: int = 0, **flags) -> list[str]:
    """The answers that a reader gets in one pass."""
    arguments = DataArguments(list(names), streaming=True, **{"shuffle_buffer_size": 1, **flags})
    records = read_streams(load_streams(arguments), arguments, seed, reader, readers)
    return [record["messages"][-1]["content"][0]["text"] for record in records]


def encoded(processor, folder: Path, *rows: dict) -> list[dict[str, torch.Tensor]]:
    dataset = ConversationDataset(load_conversations(write(folder, "encoded.jsonl", rows), "train"), processor)
    return [dataset[index] for index in range(len(dataset))]


# Forms


FORMS = {
    "messages": {"images": ["a.png"], "messages": [user("What?"), assistant("A cat.")]},
    "messages with parts": {"images": ["a.png"], "messages": [user([IMAGE, text("What?")]), assistant("A cat.")]},
    "messages with placeholders": {"images": ["a.png"], "messages": [user("<image>\nWhat?"), assistant("A cat.")]},
    "one image": {"image": "a.png", "messages": [user("What?"), assistant("A cat.")]},
    "prompt and completion": {"images": ["a.png"], "prompt": "What?", "completion": "A cat."},
    "conversational prompt": {"images": ["a.png"], "prompt": [user("What?")], "completion": [assistant("A cat.")]},
    "llava": {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_conversation(form, tmp_path):
    conversation = to_conversation(FORMS[form], tmp_path)
    assert conversation.messages == [user([IMAGE, text("What?")]), assistant([text("A cat.")])]
    assert conversation.images == [{"path": str(tmp_path / "a.png"), "bytes": None}] and conversation.videos == []
    assert conversation.prompt_messages == (1 if "prompt" in FORMS[form] else 0)


def test_the_examples_in_the_documentation(processor, media):
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    examples = [json.loads(row) for row in re.findall(r"^\| .* \| `(\{.*\})` \|$", page, re.MULTILINE)]
    for name in ("cat", "dog"):
        (media / f"{name}.png").write_bytes((media / "0.png").read_bytes())
    visual_tokens = [
        (example["mm_token_type_ids"] > 0).sum() for row in examples for example in encoded(processor, media, row)
    ]
    assert visual_tokens == [16, 16, 16, 16, 16, 16, 16, 32, 48, 32, 0]


def test_placeholders_are_in_the_users_texts_only_and_optional():
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "First <image> then\n<video>\nand?"},
        {"from": "gpt", "value": "An <image> tag."},
    ]
    conversation = to_conversation({"images": ["/a.png"], "video": "/b.mp4", "conversations": turns})
    assert conversation.messages == [
        {"role": "system", "content": [text("Be brief.")]},
        user([text("First "), IMAGE, text(" then"), VIDEO, text("and?")]),
        assistant([text("An <image> tag.")]),
    ]
    assert conversation.videos == [{"path": "/b.mp4", "bytes": None, "frames": None}]
    without = {"images": ["/a.png", "/b.png"], "videos": ["/c.mp4"], "messages": [user("?"), assistant("!")]}
    assert to_conversation(without).messages[0] == user([IMAGE, IMAGE, VIDEO, text("?")])


def bad(*messages, **columns) -> dict:
    return {"messages": list(messages), **columns}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (bad({"role": "human", "content": "a"}), "message 0 has the role 'human'"),
        (bad(user("a")), "last message must be the answer"),
        (bad(), "last message must be the answer"),
        (bad(user([]), assistant("a")), "message 0 .user. is empty"),
        (bad(user("a"), assistant("  ")), "message 1 .assistant. has no text"),
        (bad({"role": "user", "value": "a"}, assistant("b")), "message 0 .user. has no content"),
        (bad(user([{"type": "text", "content": "a"}]), assistant("b")), "part of type 'text' without `text`"),
        (bad(user([{**IMAGE, "text": "a"}]), assistant("b"), images=["a.png"]), "give it a part of its own"),
        (bad(user("a"), assistant("b"), videos=[[]]), "one of its videos has no frames"),
        (bad(user("a"), assistant([IMAGE])), "message 1 .assistant. has a part of type 'image'"),
        (bad(user([{"type": "sound"}]), assistant("a")), "type 'sound'"),
        (bad(user([{"type": ["image"]}]), assistant("a")), "part of type .'image'.; use text"),
        (bad(user(["a"]), assistant("a")), "content of message 0 .user. is neither"),
        (bad(user([IMAGE]), assistant("a")), "images: 0, but image placeholders in the messages: 1"),
        (bad(user("<image><image>"), assistant("a"), images=["/a.png"]), "images: 1, but image placeholders .*: 2"),
        (bad(user("<video>"), assistant("a")), "videos: 0, but video placeholders .*: 1"),
        (bad(user("a"), {"role": "system", "content": "b"}, assistant("c")), "message 1 has the role system"),
        (bad(user("a"), assistant("c"), images=["a.png"]), "a.png is a relative path. Give .* --image_root"),
        (bad(user("a"), assistant("c"), images=[None]), "one of the images is empty"),
        (bad(user("a"), assistant("c"), images=[{"path": 7}]), "neither a path nor a file"),
        (bad(user("a"), assistant("c"), images=["/a.png"], image="/a.png"), "both `images` and `image`"),
        (bad(user("a"), assistant([{"type": "text", "text": 0}])), "message 1 has a text that is not a string: 0"),
        (bad(user("a"), assistant(7)), "content of message 1 .assistant. is neither .*: 7"),
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, "has the role"),
        (bad(assistant("c"), images=["/a.png"]), "no user message to contain them"),
        (bad(user("a"), {**assistant("b"), "reasoning_content": "c"}), "message 1 has `reasoning_content`, which"),
        (bad(user("a"), {**assistant("b"), "tool_calls": [{"name": "c"}]}), "message 1 has `tool_calls`, which"),
        (bad(user("a"), assistant("b"), tools=[{"name": "c"}]), "the row has `tools`, which would be dropped"),
        ({"messages": "What?"}, "expected a list of messages"),
        ({"messages": None}, "has no conversation"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_in_words(row, message):
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        to_conversation(row)


# Files, folders and names


STRINGS = ["7", "true", "null", '"yes"', "[]", "2024-01-01", "1e3", "é 🐈"]


@pytest.mark.parametrize("name", ["mixed.jsonl", "mixed.json"])
def test_strings_in_json_stay_as_they_are(media, name):
    """Lists of parts from the user, strings from the assistant, and rows with different columns."""
    content = [bad(user([IMAGE, text("What?")]), assistant(answer), image="0.png") for answer in STRINGS]
    content.append({**content[0], "image": None, "images": ["1.png"], "source": "other"})
    name = write(media, name, content)
    rows = load_conversations(name, "train")
    assert answers(name) == streamed(name) == [*STRINGS, "7"]
    assert [Path(row.images[0]["path"]).name for row in rows] == 8 * ["0.png"] + ["1.png"]
    assert rows.columns == ["messages", "image", "images", "source"]
    assert rows.column("source") == 8 * [None] + ["other"] and rows.column("colour") == 9 * [None]


LINES = [json.dumps(bad(user("What?"), assistant(answer))) for answer in "ABC"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.json", "\n".join(LINES)),
        ("list.jsonl", f"[{','.join(LINES)}]"),
        ("pretty.json", json.dumps([json.loads(line) for line in LINES], indent=2)),
        ("objects.jsonl", "\n".join(json.dumps(json.loads(line), indent=2) for line in LINES)),
        ("blank.jsonl", "\n\n" + "\n \n".join(LINES) + "\n\n"),
        ("crlf.jsonl", "\r\n".join(LINES)),
        ("bom.jsonl", "\ufeff" + "\n".join(LINES)),
        ("bom.json", "\ufeff \n [" + ", ".join(LINES) + "]\n"),
    ],
)
def test_layouts_of_json(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert answers(str(tmp_path / name)) == streamed(str(tmp_path / name)) == ["A", "B", "C"]
    assert answers(str(tmp_path / name), "train[1:]") == ["B", "C"]


def test_a_changed_file_is_read_again(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(LINES))
    assert answers(str(tmp_path / "rows.jsonl")) == ["A", "B", "C"]
    (tmp_path / "rows.jsonl").write_text(LINES[2])
    os.utime(tmp_path / "rows.jsonl", (1, 1))
    assert answers(str(tmp_path / "rows.jsonl")) == ["C"]


def test_a_broken_line_is_a_bad_row(processor, tmp_path):
    lines = [LINES[0], "", '{"messages": [', "[1]", LINES[1], '{"prompt": "\\ud83d", "completion": "a"}']
    (tmp_path / "broken.jsonl").write_text("\n".join(lines))
    name = str(tmp_path / "broken.jsonl")
    problems = {
        1: "the row is not valid JSON: Expecting value, column 15",
        2: "the row is not a JSON object: [1]",
        4: "the row is not valid JSON: 'utf-8' codec can't encode character",
    }
    load(DataArguments([name], max_skipped=1.0), processor, tmp_path / "run", needs_visuals=False)
    named = skipped(tmp_path / "run")
    assert named.keys() == problems.keys() and all(problems[row] in named[row] for row in named)
    arguments = DataArguments([name], max_skipped=1.0, streaming=True, shuffle_buffer_size=1)
    take(load(arguments, processor, tmp_path / "run", needs_visuals=False, max_steps=1), 4)
    assert skipped(tmp_path / "run", "skipped_rows-0-0.jsonl") == named


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"[{LINES[0]},\n{LINES[1]}", "not valid JSON: Expecting the end of the list and .* line 2"),
        (f"[{LINES[0]},", "not valid JSON: Expecting the end of the list"),
        (f"[{LINES[0]}]\n{LINES[1]}", "not valid JSON: Expecting the end of the list and .* line 1"),
        (f"[{LINES[0]},\n{LINES[1][:-1]}]", "not valid JSON: Expecting ',' delimiter: line 2"),
        ('{\n"messages": [\n', "rows.json is not valid JSON: Expecting value: line 3"),
        ("a,b\n1,2", "line 1 of .*rows.json: the row is not valid JSON"),
        ("[]", "rows.json.* no (data|rows)"),
        (LINES[0].replace("A", "\udce9"), "line 1 of .*rows.json: byte .* of the row, 0xe9, is not UTF-8"),
    ],
)
def test_a_file_that_is_not_json_is_refused(tmp_path, content, message):
    (tmp_path / "rows.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    for read in (answers, streamed):
        with pytest.raises(UserError, match=message):
            read(str(tmp_path / "rows.json"))


def test_parquet_embeds_images_and_json_names_them(media, tmp_path):
    row = {"images": [Image.open(media / "1.png").copy()], "messages": [user("Cell?"), assistant("1")]}
    messages = List({key: Value("string") for key in ("role", "content")})
    features = Features({"images": List(DatasetImage()), "messages": messages})
    Dataset.from_list([row], features=features).to_parquet(tmp_path / "train.parquet")
    (embedded,) = load_conversations(str(tmp_path), "train")[0].images
    assert embedded["bytes"] and media_files.read_image(embedded).tobytes() == row["images"][0].tobytes()
    (named,) = load_conversations(write(media, "one.jsonl", rows_of(2)), "train")[1].images
    assert named == {"path": str(media / "1.png"), "bytes": None}


def test_a_folder_may_hold_the_images_beside_the_rows(media, tmp_path):
    for index in range(4):
        (tmp_path / f"{index}.png").write_bytes((media / f"{index}.png").read_bytes())
    write(tmp_path, "train.jsonl", rows_of(3))
    write(tmp_path, "test.jsonl", rows_of(2))
    assert len(load_conversations(str(tmp_path), "train")) == 3
    test = load_conversations(str(tmp_path), "test")
    assert len(test) == 2 and test[1].images[0]["path"] == str(tmp_path / "1.png")
    (tmp_path / "more-train.parquet").touch()
    with pytest.raises(UserError, match="both JSON and Parquet"):
        load_conversations(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("name", "split", "config_name", "message"),
    [
        ("other.jsonl", "train", None, "other.jsonl has the columns text, answer, which match no supported form"),
        ("other.jsonl", "test", None, "Cannot load split `test`"),
        ("other.jsonl", "train", "v1", "--dataset_config v1: .* is a local data set"),
        ("no/such", "train", None, "Cannot load split `train` of the data set `.*no/such`"),
        ("missing.jsonl", "train", None, "missing.jsonl: no such file"),
        ("empty.jsonl", "train", None, "empty.jsonl is empty"),
        ("other.txt", "train", None, r"must end in one of \.json"),
        ("bare", "train", None, "^bare contains no"),
        ("hidden", "train", None, "^hidden contains no"),
    ],
)
def test_names_without_conversations_are_refused(tmp_path, monkeypatch, name, split, config_name, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "other.jsonl", [{"text": "a", "answer": "b"}])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "other.txt").write_text("a")
    (tmp_path / "bare").mkdir()
    for folder in ("hidden/.git", "hidden/__old__"):
        (tmp_path / folder).mkdir(parents=True)
        write(tmp_path / folder, "rows.jsonl", rows_of(1))
    with pytest.raises(UserError, match=message):
        load_conversations(name, split, config_name)


def test_rows_keep_their_numbers(media):
    rows = load_conversations(write(media, "ten.jsonl", rows_of(10)), "train").sample(4)
    assert rows.rows == [0, 2, 5, 7] and rows.select([1, 3]).rows == [2, 7]
    assert [row.messages[1]["content"][0]["text"] for row in rows] == ["0", "2", "5", "7"]
    assert rows.column("images") == [["0.png"], ["2.png"], ["1.png"], ["3.png"]]
    assert rows.where(3).endswith("ten.jsonl, row 7 (line 8)")


# Labels


TURNS = Conversation(
    [
        {"role": "system", "content": [text("Read.")]},
        user([text("Cell alpha?")]),
        assistant([text("4")]),
        user([text("Cell bravo?")]),
        assistant([text("7")]),
    ]
)


@pytest.mark.parametrize("template", [None, QWEN3_VL_TEMPLATE], ids=["digits", "qwen3-vl"])
@pytest.mark.parametrize(
    ("train_on", "prompt_messages", "expected"),
    [("all", 0, "4<|im_end|>7<|im_end|>"), ("last", 0, "7<|im_end|>"), ("all", 4, "7<|im_end|>")],
)
def test_labels_are_the_assistants_turns(template, train_on, prompt_messages, expected):
    processor = AutoProcessor.from_pretrained(BACKBONE)
    processor.chat_template = template or processor.chat_template
    conversation = Conversation(TURNS.messages, prompt_messages=prompt_messages)
    example = ConversationEncoder(processor, train_on=train_on)(conversation)
    labelled = example["labels"] != -100
    assert processor.tokenizer.decode(example["labels"][labelled]) == expected
    assert torch.equal(example["input_ids"][labelled], example["labels"][labelled])
    assert processor.tokenizer.decode(example["input_ids"]) == (
        "<|im_start|>system\nRead.<|im_end|>\n<|im_start|>user\nCell alpha?<|im_end|>\n<|im_start|>assistant\n4"
        "<|im_end|>\n<|im_start|>user\nCell bravo?<|im_end|>\n<|im_start|>assistant\n7<|im_end|>\n"
    )


def test_another_chat_format_is_refused():
    processor = AutoProcessor.from_pretrained(BACKBONE)
    processor.chat_template = "{% for message in messages %}{{ message.role }}: {% endfor %}"
    with pytest.raises(UserError, match="made 0 .* turns of 2 answers"):
        ConversationEncoder(processor)(TURNS)


def test_a_prompt_ends_where_the_answer_begins(processor):
    prompt = processor.tokenizer.decode(ConversationEncoder(processor, prompt_only=True)(TURNS)["input_ids"])
    assert prompt.endswith("4<|im_end|>\n<|im_start|>user\nCell bravo?<|im_end|>\n<|im_start|>assistant\n")


# Images, videos and batches


@pytest.mark.parametrize("side", ["left", "right"])
def test_collator_pads_and_keeps_every_image_and_video(processor, media, side):
    rows = [
        {"images": ["0.png", "1.png"], "videos": [], "messages": [user("Cell alpha?"), assistant("1")]},
        {"images": [], "videos": [], "messages": [user("Name alpha."), assistant("alpha")]},
        {"images": ["2.png"], "videos": ["clip.mp4"], "messages": [user("<video><image>?"), assistant("2")]},
    ]
    examples = encoded(processor, media, *rows)
    batch = ConversationCollator(processor.tokenizer.pad_token_id, side)(examples)
    lengths = [len(example["input_ids"]) for example in examples]
    assert batch["attention_mask"].sum(1).tolist() == lengths and lengths[1] < lengths[0] < lengths[2]
    assert batch["attention_mask"][1, 0 if side == "left" else -1] == 0
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert batch["image_grid_thw"].shape == (3, 3)
    assert torch.equal(batch["pixel_values"], torch.cat([examples[0]["pixel_values"], examples[2]["pixel_values"]]))
    # 3 seconds at 2 frames a second, two frames a step
    assert batch["video_grid_thw"].tolist() == [[3, 8, 8]] and len(batch["pixel_values_videos"]) == 3 * 8 * 8
    assert [(batch["mm_token_type_ids"] == kind).sum(1).tolist() for kind in (1, 2)] == [[32, 0, 16], [0, 0, 48]]


def test_a_video_is_sampled_with_its_times(processor, media):
    turns = [user("Cell?"), assistant("1")]
    frames = [f"{index}.png" for index in range(4)]
    (file,) = encoded(processor, media, {"videos": ["clip.mp4"], "messages": turns})
    brightness = file["pixel_values_videos"].view(3, -1).mean(dim=1).tolist()
    assert brightness[0] < brightness[1] - 0.3 < brightness[2] - 0.6  # it grows by 10 of 255 a frame
    # Frames 0, 5, 9, 14, 18, 23 of 24, at 8 a second
    times = re.findall("<([0-9.]+) seconds>", processor.tokenizer.decode(file["input_ids"]))
    assert times == ["0.3", "1.4", "2.6"]

    (pictures,) = encoded(processor, media, {"videos": [frames], "messages": turns})
    assert pictures["video_grid_thw"].tolist() == [[2, 8, 8]]
    last = processor.image_processor([Image.open(media / "3.png")], return_tensors="pt")["pixel_values"]
    assert (pictures["pixel_values_videos"][-1, -16:] - last[-1, -16:]).abs().max() < 1e-5
    times = re.findall("<([0-9.]+) seconds>", processor.tokenizer.decode(pictures["input_ids"]))
    assert times == ["0.2", "1.2"]  # two frames a second


def test_a_video_may_be_embedded(processor, media):
    turns = [user("Cell?"), assistant("1")]
    features = Features({"videos": List(Video()), "messages": List({key: Value("string") for key in turns[0]})})
    row = {"videos": [{"path": None, "bytes": (media / "clip.mp4").read_bytes()}], "messages": turns}
    rows = Conversations("embedded", Dataset.from_list([row], features=features))
    (expected,) = encoded(processor, media, {"videos": ["clip.mp4"], "messages": turns})
    embedded = ConversationDataset(rows, processor)[0]
    assert all(torch.equal(expected[key], embedded[key]) for key in expected)


def test_a_run_with_videos_stops_without_pyav(processor, media, tmp_path, monkeypatch):
    def fail(*_):
        raise ImportError("no module named av")

    monkeypatch.setattr(media_files, "read_video_pyav", fail)
    name = write(media, "video.jsonl", problem_rows()[8:])
    with pytest.raises(SetupError, match="pip install av"):
        load(DataArguments([name], max_skipped=1.0), processor, tmp_path)
    with pytest.raises(SetupError, match="pip install av"):
        take(stream([name], processor, tmp_path, max_skipped=1.0), 1)


def test_errors_name_the_row(processor, media):
    rows = load_conversations(write(media, "named.jsonl", rows_of(4)), "train")
    with pytest.raises(
        UserError, match=r"named.jsonl, row 3 \(line 4\): the conversation has 32 tokens \(16 of them visual\)"
    ):
        ConversationDataset(rows, processor, max_length=31)[3]
    assert len(ConversationDataset(rows, processor, max_length=32)[3]["input_ids"]) == 32


# Mixtures


def test_mixtures_keep_weights_and_numbers(media):
    parts = [load_conversations(write(media, f"{name}.jsonl", rows_of(count)), "train") for name, count in
             (("many", 600), ("few", 200))]  # fmt: skip
    one_after_the_other = Mixture(parts)
    assert len(one_after_the_other) == 800 and one_after_the_other.where(799).endswith("few.jsonl, row 199 (line 200)")

    drawn = Mixture(parts, [9, 1], seed=0)
    share = sum(part == 0 for part, _ in drawn.places) / len(drawn)
    assert share == pytest.approx(0.9, abs=0.03) and len(set(drawn.places)) == len(drawn)  # no row twice
    assert drawn.places == Mixture(parts, [0.9, 0.1], seed=0).places != Mixture(parts, [9, 1], seed=1).places
    everything = Mixture(parts, [9, 1], "all_exhausted", seed=0)
    assert set(everything.places) == set(one_after_the_other.places) and len(everything) > 1500


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dataset_weights": [1.0]}, "one number above 0 for each of several data sets; --dataset_name has 2"),
        ({"dataset_weights": [1.0, 0.0]}, "one number above 0 for each"),
        ({"dataset_split": ["a", "b", "c"]}, "--dataset_split has 3 values for 2 data sets"),
        ({"max_samples": [0]}, "--max_samples 0: it must be at least 1"),
        ({"max_skipped": 2.0}, "--max_skipped 2.0: give a number between 0 and 1"),
        ({"stopping_strategy": "all_exhausted"}, "only works with --dataset_weights"),
        ({"streaming": True}, "with several data sets needs --dataset_weights"),
        ({"streaming": True, "dry_run": True, "dataset_weights": [1, 1]}, "--dry_run reads all rows"),
    ],
)
def test_invalid_flags_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        DataArguments(["a", "b"], **flags)


# Validation


def problem_rows() -> list[dict]:
    rows = [
        {"images": ["0.png"]},
        {"images": ["no.png"]},
        {"images": ["broken.png"]},
        {"images": ["0.png"], "messages": [user("<image><image>"), assistant("1")]},
        {"images": ["0.png"], "messages": [user("Cell?"), assistant("")]},
        {"images": ["0.png"], "messages": [user("Cell " * 90), assistant("1")]},
        {"videos": ["broken.mp4"]},
        {"videos": ["no.mp4"]},
        {"videos": ["clip.mp4"]},
    ]
    return [{"images": [], "videos": [], "messages": [user("Cell?"), assistant("1")], **row} for row in rows]


PROBLEMS = {
    1: "no.png does not exist",
    2: "broken.png cannot be read",
    3: "images: 1, but image placeholders",
    4: "has no text",
    5: "more than max_length 100",
    6: "broken.mp4 cannot be read",
    7: "no.mp4 does not exist",
}


def load(arguments: DataArguments, processor, output_dir: Path, needs_visuals: bool = True, **training):
    args = PVMTrainingArguments(output_dir=str(output_dir), use_cpu=True, **training)
    return load_training_data(arguments, args, processor, needs_visuals, Console(width=100, quiet=True))


def skipped(output_dir: Path, name: str = "skipped_rows.jsonl") -> dict[int, str]:
    lines = [json.loads(line) for line in (output_dir / name).read_text().splitlines()]
    return {line["row"]: line["problem"] for line in lines}


def check_skipped(output_dir: Path, name: str = "skipped_rows.jsonl") -> None:
    named = skipped(output_dir, name)
    assert named.keys() == PROBLEMS.keys() and all(PROBLEMS[row] in problem for row, problem in named.items())


@pytest.mark.parametrize("num_workers", [1, 2])
def test_bad_rows_are_skipped_and_named(processor, media, tmp_path, num_workers):
    name = write(media, "problems.jsonl", problem_rows())
    arguments = DataArguments([name], max_length=100, max_skipped=0.8, preprocessing_num_workers=num_workers)
    rows = load(arguments, processor, tmp_path).conversations
    assert [rows.where(index) for index in range(len(rows))] == [f"{name}, row 0 (line 1)", f"{name}, row 8 (line 9)"]
    check_skipped(tmp_path)


def test_too_many_bad_rows_stop_the_run(processor, media, tmp_path):
    name = write(media, "problems.jsonl", problem_rows())
    with pytest.raises(
        UserError, match=r"7 of 9 rows of .*problems.jsonl cannot be used, .* 0.01 allows.*\n.*row 1 .line 2.: "
    ):
        load(DataArguments([name], max_length=100), processor, tmp_path)
    check_skipped(tmp_path)


def test_the_check_counts_what_training_sees_and_is_cached(processor, media, tmp_path, monkeypatch):
    rows, settings = load_conversations(write(media, "counted.jsonl", rows_of(5)), "train"), {"train_on": "all"}
    checked = check_rows(rows, processor, settings)
    length = len(ConversationDataset(rows, processor)[4]["input_ids"])
    counts = {"row": 4, "problem": None, "length": length, "visual_tokens": 16, "label_tokens": 2}
    assert checked[4] == {**counts, "content": content_digest(rows[4])}

    def fail(*_):
        raise AssertionError("checked again")

    monkeypatch.setattr(validation, "_check_row", fail)
    assert check_rows(rows, processor, settings)[:] == checked[:]
    for changed in ({"settings": {"max_length": 31}}, {"settings": settings, "overwrite_cache": True}):
        with pytest.raises(AssertionError, match="checked again"):
            check_rows(rows, processor, **changed)
    for file in Path(validation.__file__).parent.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(validation, "__file__", str(tmp_path / "validation.py"))
    assert check_rows(rows, processor, settings)[:] == checked[:]
    (tmp_path / "forms.py").write_text("# changed")
    with pytest.raises(AssertionError, match="checked again"):
        check_rows(rows, processor, settings)


def test_pvm_needs_an_image_and_other_methods_do_not(processor, media, tmp_path):
    name = write(media, "text.jsonl", rows_of(3, images=False))
    with pytest.raises(UserError, match="No row of .*text.jsonl has an image or a video, without which PVM"):
        load(DataArguments([name]), processor, tmp_path)
    assert len(load(DataArguments([name]), processor, tmp_path, needs_visuals=False)) == 3


def test_a_dry_run_shows_the_data_and_loads_no_model(media, tmp_path, capsys, monkeypatch):
    def fail(_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(train, "load_model", fail)
    names = [write(media, "problems.jsonl", problem_rows()), write(media, "more.jsonl", rows_of(8))]
    flags = ["--model_name_or_path", str(BACKBONE), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    dry_run = [*flags, "--dataset_name", *names, "--max_length", "100", "--dry_run", "true"]
    (tmp_path / "skipped_rows.jsonl").write_text("of a run before")
    with pytest.raises(UserError, match=r"A training would stop here: 7 of 9 rows of .*dry_run.json lists them"):
        train.main(dry_run)
    assert (tmp_path / "skipped_rows.jsonl").read_text() == "of a run before"
    report = json.loads((tmp_path / "dry_run.json").read_text())
    counts = [(source["rows"], source["refused"], source["epoch_rows"]) for source in report["sources"]]
    assert counts == [(9, 7, 2), (8, 0, 8)]
    assert report["sources"][1]["tokens"] == 8 * 32 and report["sources"][1]["visual_tokens"] == 8 * 16
    assert report["quantiles"]["half"]["length"] == 32 and report["quantiles"]["most"]["visual_tokens"] == 48
    assert {row["row"] for row in report["refused"]} == set(PROBLEMS)
    output = capsys.readouterr().out
    assert "refused rows" in output and f"Written: {tmp_path}" in output and "would continue" not in output
    train.main([*dry_run, "--max_skipped", "0.8"])
    assert "A training would continue from here." in capsys.readouterr().out
    with pytest.raises(AssertionError, match="a model was loaded"):  # what the dry run wrote may be overwritten
        train.main([*flags, "--dataset_name", names[1]])


def test_an_image_deleted_after_the_check_is_one_sentence(media, tmp_path, monkeypatch):
    """Even from a data loader worker, whose errors torch wraps in a traceback."""
    monkeypatch.setattr(validation, "SAMPLED_ROWS", 1)  # the check does not see that row 2 has changed
    rows = rows_of(3)
    rows[2]["images"] = ["gone.png"]
    (media / "gone.png").write_bytes((media / "0.png").read_bytes())
    name = write(media, "gone.jsonl", rows)

    def run(folder: str, *flags: str) -> None:
        train.main(
            ["--model_name_or_path", str(BACKBONE), "--pvm_hidden_size", "32", "--dataset_name", name, "--use_cpu",
             "true", "--output_dir", str(tmp_path / folder), "--dataloader_num_workers", "2", "--max_skipped", "0.5",
             "--disable_tqdm", "true", *flags]
        )  # fmt: skip

    run("checked", "--dry_run", "true")
    (media / "gone.png").unlink()
    with pytest.raises(UserError) as error:
        run("run")
    assert str(error.value) == (
        f"{name}, row 2 (line 3): the image {media}/gone.png does not exist: check the path and --image_root, the "
        "folder or zip file that relative paths start from. It was usable when it was checked. If files have changed, "
        "check again with --overwrite_cache true."
    )
    (tmp_path / "run").rename(tmp_path / "failed")
    run("run", "--overwrite_cache", "true")
    assert "does not exist" in skipped(tmp_path / "run")[2]


# Streams


def stream(names: list[str], processor, output_dir: Path, **flags) -> ConversationStream:
    flags = {"shuffle_buffer_size": 1, **flags}
    return load(DataArguments(names, streaming=True, **flags), processor, output_dir, max_steps=1)


def take(dataset: ConversationStream, count: int) -> list:
    return [example for example, _ in zip(dataset, range(count))]


def test_a_stream_has_the_rows_of_the_data_set(processor, media, tmp_path):
    rows = [{**row, "videos": []} for row in rows_of(3)] + problem_rows()[8:]
    names = [write(media, "images_and_video.jsonl", rows)]
    expected = load(DataArguments(names), processor, tmp_path)
    examples = take(stream(names, processor, tmp_path), 9)  # twice all, and one
    for index, example in enumerate(examples):
        wanted = expected[index % 4]
        assert example.keys() == wanted.keys() and all(torch.equal(example[key], wanted[key]) for key in wanted)


def test_a_stream_skips_and_names_bad_rows(processor, media, tmp_path, monkeypatch):
    name = write(media, "problems.jsonl", problem_rows())
    assert len(take(stream([name], processor, tmp_path, max_length=100, max_skipped=0.8), 5)) == 5
    check_skipped(tmp_path, "skipped_rows-0-0.jsonl")
    with pytest.raises(UserError, match="7 of the first 9 rows cannot be used, more than --max_skipped 0.5"):
        take(stream([name], processor, tmp_path, max_length=100, max_skipped=0.5), 3)
    monkeypatch.setattr(streams, "WATCH_AFTER", 4)  # before the end of the data
    with pytest.raises(UserError, match="3 of the first 4 rows"):
        take(stream([name], processor, tmp_path, max_length=100), 2)


def test_a_stream_needs_an_image_in_its_first_rows(processor, media, tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "WATCH_AFTER", 4)
    text_only = write(media, "text.jsonl", rows_of(9, images=False))
    with pytest.raises(UserError, match="None of the first 4 rows of .*text.jsonl has an image or a video"):
        stream([text_only], processor, tmp_path)
    mixed = write(media, "mixed.jsonl", rows_of(3, images=False) + rows_of(1) + rows_of(5, images=False))
    # One reader's share has no image.
    assert len(take(stream([text_only, mixed], processor, tmp_path, dataset_weights=[1, 1]), 9)) == 9


def shares(name: str, readers: int, **flags) -> list[str]:
    return ["".join(streamed(name, reader=reader, readers=readers, **flags)) for reader in range(readers)]


def test_readers_share_files_if_there_are_enough_and_else_rows(tmp_path):
    rows, name = rows_of(10, images=False), str(tmp_path)
    write(tmp_path, "a-train.jsonl", rows[:7])
    write(tmp_path, "b-train.jsonl", rows[7:])
    assert shares(name, 2) == ["0123456", "789"]
    assert shares(name, 3) == ["0369", "147", "258"]
    assert shares(name, 2, max_samples=[4]) == ["02", "13"]
    (tmp_path / "b-train.jsonl").write_text("\n")  # with an empty file, no reader is left without rows
    assert shares(name, 2) == ["0123456", "135"]


def test_each_pass_has_all_rows_in_another_order(tmp_path):
    """In a mixture of data sets with enough files for all readers and with fewer."""
    names = [str(tmp_path / "5 files"), str(tmp_path / "2 files")]
    for number, files in enumerate((5, 2)):
        Path(names[number]).mkdir()
        for file in range(files):
            rows = [bad(user("?"), assistant(f"{number}{file}{row}")) for row in range(10)]
            write(Path(names[number]), f"{file}-train.jsonl", rows)
    flags = {"dataset_weights": [5, 2], "shuffle_buffer_size": 20, "stopping_strategy": "all_exhausted"}
    passes = [
        [streamed(*names, reader=reader, readers=3, seed=seed, **flags) for reader in range(3)] for seed in (0, 1, 0)
    ]
    for read in passes:
        assert len(set().union(*read)) == 70 and sum(len(set(share)) for share in read) == 70
    assert passes[0] != passes[1] and passes[0] == passes[2]


@pytest.mark.parametrize("files", [2, 5])
def test_no_worker_of_any_rank_runs_out(processor, tmp_path, files):
    for file in range(files):
        write(tmp_path, f"{file}-train.jsonl", rows_of(10, images=False)[file::files])
    arguments = DataArguments([str(tmp_path)], streaming=True)
    for rank in range(2):
        dataset = ConversationStream(
            load_streams(arguments), ConversationEncoder(processor), arguments, tmp_path, 0, rank, world_size=2
        )
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
        digits = [processor.tokenizer.decode(example["labels"][-3:-2]) for example, _ in zip(loader, range(60))]
        assert len(digits) == 60
        if files != 5:  # reader r of 4 has every fourth row from row r on
            assert len(set(digits)) == (6 if rank == 0 else 4)


def test_a_stream_needs_steps_and_a_row_for_each_reader(processor, media, tmp_path):
    arguments = DataArguments([write(media, "three.jsonl", rows_of(3))], streaming=True)
    with pytest.raises(UserError, match="--streaming true needs --max_steps"):
        load(arguments, processor, tmp_path)
    with pytest.raises(UserError, match="three.jsonl has 3 rows for 4 readers .processes x --dataloader_num_workers"):
        load(arguments, processor, tmp_path, max_steps=1, dataloader_num_workers=4)
    assert len(take(load(arguments, processor, tmp_path, max_steps=1, dataloader_num_workers=3), 9)) == 9


def test_a_stream_of_several_is_mixed_by_weight(media, tmp_path):
    names = [write(media, "many.jsonl", rows_of(300)), write(media, "few.json", [FORMS["llava"]] * 100)]
    arguments = DataArguments(names, dataset_weights=[0.8, 0.2], streaming=True, max_samples=[250, 100])
    opened = load_streams(arguments)
    rows = [(record["dataset"], record["row"]) for record in read_streams(opened, arguments, seed=0)]
    share = sum(name == names[0] for name, _ in rows) / len(rows)
    assert share == pytest.approx(0.8, abs=0.06) and len(set(rows)) == len(rows) > 200
    assert rows == [(record["dataset"], record["row"]) for record in read_streams(opened, arguments, seed=0)]


def test_a_training_on_streams_of_mixed_forms_resumes_exactly(media, tmp_path):
    """With images, a video and text."""
    names = [write(media, "images.jsonl", rows_of(6) + rows_of(2, images=False))]
    names.append(write(media, "video.jsonl", problem_rows()[8:]))
    names.append(write(media, "llava.json", [{**FORMS["llava"], "image": f"{index}.png"} for index in (2, 3)]))

    def run(folder: str, *flags: str) -> dict[str, torch.Tensor]:
        train.main(
            ["--model_name_or_path", str(BACKBONE), "--pvm_hidden_size", "32", "--dataset_name", *names,
             "--output_dir", str(tmp_path / folder), "--max_steps", "4", "--save_steps", "2", "--use_cpu", "true",
             "--per_device_train_batch_size", "3", "--streaming", "true", "--disable_tqdm", "true",
             "--learning_rate", "1e-3", "--warmup_steps", "0", "--dataset_weights", "5", "3", "2", *flags]
        )  # fmt: skip
        return load_file(tmp_path / folder / "model.pvm.safetensors")

    whole = run("whole")
    resumed = run("resumed", "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert all(weight.item() != 0 for name, weight in whole.items() if name.endswith("gate_alpha"))


@pytest.mark.parametrize("form", ["conversational prompt", "llava"])
def test_evaluation_reads_the_same_forms(processor, media, form):
    row = {**FORMS[form], **{key: "0.png" if key == "image" else ["0.png"] for key in FORMS[form] if "image" in key}}
    rows = load_conversations(write(media, "one.jsonl", [row]), "train")
    prompts = Prompts(rows, processor)
    (question,) = read_questions(rows, None, r"\S+", processor.tokenizer)
    assert (question.question, question.reference, question.row) == ("What?", "A cat.", 0)
    tail = processor.tokenizer("<|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert prompts.distances == [len(tail)] and prompts[0]["pixel_values"].shape[0] == 64
