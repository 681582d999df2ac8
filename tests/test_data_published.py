"""The paper's data sets in their publishers' layouts, questions with answers, and parts that name their images."""

import json
import zipfile
from pathlib import Path

import datasets
import pytest
from datasets import Value
from transformers import AutoProcessor

import eval as eval_script
import published
import train
from pvm.data.encoding import ConversationDataset, refuse_special_tokens
from pvm.data.forms import message_text, to_conversation, to_prompt
from pvm.data.sources import DataArguments, load_conversations, load_sources
from pvm.data.streams import load_streams, read_streams
from pvm.errors import UserError


BACKBONE = Path(__file__).parents[1] / "assets" / "digits-backbone"
IMAGE = {"type": "image"}


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(BACKBONE)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Tests do not share a cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def text(value: str) -> dict:
    return {"type": "text", "text": value}


THOUGHT = "<think>Hm.</think><answer>0</answer>"
# Each set: what to load (relative to its folder, with its split and root), the number of usable rows, images by row,
# and the first reference.
SETS = {
    "OpenMMReasoner-SFT": ("openmmreasoner_sft", "llava_cot", "train", "sft_image", [1] * 6, THOUGHT),
    "OpenMMReasoner-SFT, text": ("openmmreasoner_sft", "m1_sft", "train", None, [0] * 3, THOUGHT),
    "OpenMMReasoner-RL": ("openmmreasoner_rl", "virl39k", "train", None, [0, 1, 2, 0, 1, 2], "0"),
    "OpenMMReasoner-RL, validation": ("openmmreasoner_rl", "validation", "validation", None, [0, 1, 2, 0, 1, 2], "0"),
    "ViRL39K": ("virl39k", "39Krelease.parquet", "train", "images.zip", [2, 1, 2, 1, 2, 1], r"\boxed{A}"),
    "ViRL39K, folder": ("virl39k", "", "train", "images.zip", [2, 1, 2, 1, 2, 1], r"\boxed{A}"),
    "MMK12": ("mmk12", "", "test", None, [1] * 4, "A"),
    "ThinkLite-VL-hard": ("thinklite", "", "train", None, [1] * 4, "0"),
    "We-Math2.0-Pro": ("wemath_pro", "", "pro", None, [1] * 12, "B"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_published_sets_are_read(name, processor, tmp_path):
    build, path, split, root, images, reference = SETS[name]
    folder = getattr(published, build)(tmp_path)
    root = root and str(folder / root)
    rows = load_conversations(str(folder / path), split, image_root=root)
    usable, problems = [], []
    for index in range(len(rows)):
        try:
            usable.append(rows[index])
        except UserError as error:
            problems.append(str(error))
    assert [len(row.images) for row in usable] == images
    assert len(problems) == len(rows) - len(images) == (8 if "We-Math" in name else 0)
    assert all(problem.startswith(("its `question` is empty", "its `answer` is empty")) for problem in problems)
    prompt, answer = to_prompt(usable[0])
    assert answer == reference and prompt.messages == usable[0].messages[:-1]
    assert prompt.messages[-1]["role"] == "user"

    kept = rows.select([index for index in range(len(rows)) if "We-Math" not in name or index % 2 or index > 15])
    for example, count in zip(ConversationDataset(kept, processor), images):
        assert (example["mm_token_type_ids"] == 1).sum() == 16 * count
        labels = example["labels"][example["labels"] >= 0]
        assert processor.tokenizer.decode(labels).endswith("<|im_end|>")

    arguments = DataArguments(
        [str(folder / path)], dataset_split=[split], image_root=root and [root], streaming=True, shuffle_buffer_size=1
    )
    records = read_streams(load_streams(arguments), arguments, seed=0)
    assert [len(record["images"]) for record in records if record["problem"] is None] == images


def test_virl39k_may_be_extracted(tmp_path):
    folder = published.virl39k(tmp_path)
    zipped = load_conversations(str(folder), "train", image_root=str(folder / "images.zip"))[0].images[0]
    zipfile.ZipFile(folder / "images.zip").extractall(folder)
    extracted = load_conversations(str(folder), "train")[0].images[0]
    assert extracted["path"] == str(folder / "images" / "0-0.png") and "images.zip" in zipped["path"]


def run(folder: Path, *flags: str) -> None:
    train.main(
        ["--model_name_or_path", str(BACKBONE), "--pvm_hidden_size", "32", "--use_cpu", "true", "--max_steps", "2",
         "--output_dir", str(folder), "--disable_tqdm", "true", *map(str, flags)]
    )  # fmt: skip


def test_configs_and_sets_are_mixed_and_trained_on(tmp_path):
    """Each with its own root; what is empty is counted and named."""
    sft, virl = published.openmmreasoner_sft(tmp_path / "sft"), published.virl39k(tmp_path / "virl")
    wemath = published.wemath_pro(tmp_path / "wemath")
    run(
        tmp_path / "run",
        *("--dataset_name", sft / "llava_cot", sft / "m1_sft", virl / "39Krelease.parquet", wemath),
        *("--dataset_split", "train", "train", "train", "pro", "--max_skipped", "0.4"),
        *("--image_root", sft / "sft_image", sft / "sft_image", virl / "images.zip", wemath),
    )
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped_rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in skipped] == list(range(0, 16, 2))
    assert {row["dataset"] for row in skipped} == {str(wemath)}
    assert {row["problem"].split(".")[0] for row in skipped} == {"its `question` is empty", "its `answer` is empty"}
    assert (tmp_path / "run" / "model.pvm.safetensors").exists()


@pytest.mark.parametrize(
    ("build", "flags", "message"),
    [
        (
            "virl39k",
            "{}",
            "6 of 6 rows of .*row 0: the image .*images/0-0.png does not exist: .*, such as .*images.zip",
        ),
        ("virl39k", "{} --image_root {}/other", "--image_root .*/other: no such folder or zip file"),
        ("virl39k", "{} --image_root {}/39Krelease.parquet", "cannot be read from .*parquet: File is not a zip file"),
        ("openmmreasoner_sft", "{}/llava_cot --image_root {}", "row 0: the image .*/llava_cot/0.png does not exist"),
        ("openmmreasoner_sft", "{}/llava_cot", "row 0: the image .*/llava_cot/llava_cot/0.png does not exist"),
        (
            "wemath_pro",
            "{} --dataset_split pro",
            "8 of 20 rows of .*row 0: its `answer` is empty. Fill it in, or remove",
        ),
        ("wemath_pro", "{}", "Cannot load split `train` of the data set .*pro"),
    ],
)
def test_what_is_wrong_with_a_set_is_one_sentence(build, flags, message, tmp_path):
    folder = getattr(published, build)(tmp_path / "set")
    with pytest.raises(UserError, match=f"(?s){message}"):
        run(tmp_path / "run", "--dataset_name", *flags.replace("{}", str(folder)).split())


def test_published_sets_are_evaluated_on(tmp_path):
    virl = published.virl39k(tmp_path / "virl")
    eval_script.main(
        ["--model", str(BACKBONE), "--dataset_name", str(virl), "--dataset_split", "train", "--max_samples", "2",
         "--image_root", str(virl / "images.zip"), "--output_dir", str(tmp_path / "report"), "--max_new_tokens", "2",
         "--diagnostic_rows", "1"]
    )  # fmt: skip
    lines = (tmp_path / "report" / "predictions" / "digits-backbone.jsonl").read_text().splitlines()
    assert [json.loads(line)["reference"] for line in lines] == [r"\boxed{A}"] * 2
    with pytest.raises(UserError, match=r"row 0: the image .*does not exist: .*images.zip"):
        eval_script.main(
            ["--model", str(BACKBONE), "--dataset_name", str(virl), "--dataset_split", "train",
             "--output_dir", str(tmp_path / "other")]
        )  # fmt: skip


def test_a_changed_layout_names_the_columns(tmp_path):
    rows = [{"question": "a", "solution": "b"}]
    file = published.parquet(tmp_path / "train.parquet", rows, dict.fromkeys(rows[0], Value("string")))
    with pytest.raises(UserError, match="has the columns question, solution, which match no supported form. It needs"):
        load_conversations(str(file), "train")


def test_sources_have_their_own_roots(tmp_path):
    sft = published.openmmreasoner_sft(tmp_path)
    names = [str(sft / "llava_cot"), str(sft / "m1_sft")]
    roots = [
        source.root for source in load_sources(DataArguments(names, image_root=[str(sft / "sft_image"), str(sft)]))
    ]
    assert roots == [sft / "sft_image", sft]
    with pytest.raises(UserError, match="--image_root has 3 values for 2 data sets"):
        DataArguments(names, image_root=["a", "b", "c"])


# Questions with answers


@pytest.mark.parametrize(
    "row",
    [
        {"question": "<image>How many?", "answer": "3", "image": "/a.png"},
        {"problem": "How many?", "answer": "3", "images": ["/a.png"]},
        {"prompt": "How many?", "answer": 3, "image": ["/a.png"]},
        {"prompt": [{"role": "user", "content": "<image>How many?"}], "answer": "3", "images": ["/a.png"]},
        {"prompt": "How many?", "reward_model": {"ground_truth": "3", "style": "rule"}, "images": ["/a.png"]},
        {"prompt": None, "question": "How many?", "answer": "3", "image": "/a.png"},
        {"question": "How many?", "answer": None, "reward_model": {"ground_truth": "3"}, "image": "/a.png"},
        {"prompt": "How many?", "answer": "5", "completion": "3", "image": "/a.png"},
    ],
)
def test_questions_with_answers(row):
    conversation = to_conversation(row)
    assert conversation.messages == [
        {"role": "user", "content": [IMAGE, text("How many?")]},
        {"role": "assistant", "content": [text("3")]},
    ]
    assert conversation.images == [{"path": "/a.png", "bytes": None}] and conversation.prompt_messages == 1
    prompt, reference = to_prompt(conversation)
    assert prompt.messages == conversation.messages[:1] and reference == "3" and prompt.images == conversation.images


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "", "answer": "3"}, "its `question` is empty. Fill it in, or remove the row"),
        ({"problem": " \n", "answer": "3"}, "its `problem` is empty"),
        ({"question": "a", "answer": None}, "its `answer` is empty"),
        ({"question": "a", "answer": float("nan")}, "its `answer` is empty"),
        ({"question": "a", "answer": " "}, "its `answer` is empty"),
        ({"prompt": [], "answer": "3"}, "its `prompt` does not end with a message from the user"),
        ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "answer": "3"},
         "its `prompt` does not end with a message from the user, which `answer` would answer"),
        ({"prompt": "a", "reward_model": {"style": "rule"}}, "its `reward_model.ground_truth` is empty"),
        ({"prompt": "a", "reward_model": None}, "its `answer` is empty"),
        ({"question": "a", "answer": ["3"]}, "its `answer` is neither a text nor a number: .'3'."),
        ({"question": "a", "answer": True}, "its `answer` is neither a text nor a number"),
        ({"question": 7, "answer": "3"}, "expected a list of messages, found '7'"),
        ({"question": "a"}, "has no conversation. It needs"),
        ({"answer": "a"}, "has no conversation. It needs"),
        ({"question": "<image>?", "answer": "a", "image": None}, "images: 0, but image placeholders"),
    ],
)  # fmt: skip
def test_questions_and_answers_that_cannot_be_used(row, message):
    with pytest.raises(UserError, match=message):
        to_conversation(row)


# Parts that name their images


def parts(*content: dict, **columns) -> dict:
    return {
        "messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "A."}],
        **columns,
    }


def image_url(url: object) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def test_parts_may_name_images(tmp_path):
    row = parts(
        text("This:"),
        image_url("a.png"),
        image_url("/b.png"),
        {"type": "image_url", "image_url": "c.png"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,QQ==", "detail": "high"}, "text": None},
        {"type": "video_url", "video_url": {"url": "d.mp4"}},
        {**text("?"), "image_url": {"url": None}},
    )
    conversation = to_conversation(row, tmp_path)
    content = conversation.messages[0]["content"]
    assert [part["type"] for part in content] == ["text", *["image"] * 4, "video", "text"]
    assert all(part.keys() == {"type"} for part in content[1:6])
    assert [image["path"] for image in conversation.images] == [
        f"{tmp_path}/a.png",
        "/b.png",
        f"{tmp_path}/c.png",
        None,
    ]
    assert conversation.images[3]["bytes"] == b"A" and conversation.videos[0]["path"] == f"{tmp_path}/d.mp4"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (parts(image_url("a.png"), images=["/b.png"]), "names images in a column and in parts of type 'image_url'"),
        (parts(image_url("/a.png"), IMAGE), "images: 1, but image placeholders in the messages: 2"),
        (parts(image_url(None)), "a part of type 'image_url' without a URL or path"),
        (parts({"type": "image_url"}), "a part of type 'image_url' without a URL or path"),
        (parts({"type": "image_url", "image_url": {"url": 7}}), "a part of type 'image_url' without a URL or path"),
        (parts({**image_url("/a.png"), "text": "a"}), "give it a part of its own"),
        (parts({**text("a"), "image_url": {"url": "/a.png"}}), "names a file in a part of type 'text'"),
        (parts({"type": "image", "image": "/a.png"}), "names a file in a part of type 'image'. Name it in the column"),
        (parts({"type": "image", "url": "http://a/b"}, images=["/a.png"]), "names a file in a part of type 'image'"),
        (parts(image_url("http://127.0.0.1/a.png")), "is a URL, .*--allow_image_urls true"),
        (parts(image_url("a.png")), "a.png is a relative path. Give .*--image_root"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [image_url("/a.png")]}]},
         "has a part of type 'image', which only users can send"),
    ],
)  # fmt: skip
def test_parts_that_cannot_be_used(row, message):
    with pytest.raises(UserError, match=message):
        to_conversation(row)


# Special tokens


NAMES = ("im_start", "im_end", "endoftext", "vision_start", "vision_end", "image_pad", "video_pad")
ADDED = [f"<|{name}|>" for name in NAMES]


def said(question: list[dict], answer: list[dict], **columns) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **columns}


@pytest.mark.parametrize("prompt_only", [False, True])
@pytest.mark.parametrize("token", ADDED)
def test_special_tokens_in_any_text_are_refused(processor, token, prompt_only, tmp_path):
    half = len(token) // 2
    rows = [
        said([text(f"a {token} b")], [text("c")]),
        said([text("a"), text(token[:half]), text(token[half:])], [text("c")]),
        said([text("a")], [text(f"c{token}")]),
        said([text("a")], [text(token[:1]), text(token[1:-1]), text(f"{token[-1]} c")]),
        {"prompt": "a", "completion": f"{token}"},
        {"question": token, "answer": "3"},
        {"messages": [{"role": "system", "content": token}, *said([text("a")], [text("c")])["messages"]]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_conversations(str(tmp_path / "rows.jsonl"), "train")
    dataset = ConversationDataset(loaded, processor, prompt_only=prompt_only)
    for index, message in enumerate((0, 0, 1, 1, 1, 0, 0)):
        with pytest.raises(UserError) as error:
            dataset[index]
        assert f"the text of message {message} contains {token}, which the chat format reserves" in str(error.value)


def test_texts_that_only_look_like_special_tokens_are_used(processor):
    texts = ["<|im_", "end|>", "<|IM_END|>", "<| im_end |>", "<think>a</think>", "<tool_call>", "<|im_end", "im_end|>"]
    for value in texts:
        conversation = to_conversation(said([text(value), IMAGE, text(value)], [text(value)], images=["/a.png"]))
        refuse_special_tokens(conversation.messages, processor)
    assert message_text(conversation.messages[1]) == texts[-1]


def test_a_token_made_by_several_messages_is_refused(processor):
    """In a format without tokens between messages."""
    other = AutoProcessor.from_pretrained(BACKBONE)
    other.chat_template = (
        "{% for message in messages %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    conversation = to_conversation(said([text("a <|im_")], [text("end|> b")]))
    refuse_special_tokens(conversation.messages, processor)
    with pytest.raises(UserError, match="the text of several messages together contains <.im_end.>"):
        refuse_special_tokens(conversation.messages, other)
