"""Data files and folders: broken bytes and keys, where a problem is, and folders full of other files."""

import json
import os
from pathlib import Path

import datasets
import pytest
from rich.console import Console
from transformers import AutoProcessor

from pvm.data import sources
from pvm.data.sources import DataArguments, load_conversations
from pvm.data.streams import ConversationStream
from pvm.data.validation import load_training_data
from pvm.errors import UserError
from pvm.training.trainer import PVMTrainingArguments


BACKBONE = Path(__file__).parents[1] / "assets" / "digits-backbone"


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(BACKBONE)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Tests do not share a cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def row(answer: str) -> str:
    return json.dumps({"prompt": "What?", "completion": answer})


def answers(name: Path, split: str = "train") -> list[str]:
    return [row.messages[-1]["content"][0]["text"] for row in load_conversations(str(name), split)]


def skipped(name: Path, processor, output_dir: Path, streaming: bool) -> list[dict]:
    """What a run lists as unusable."""
    arguments = DataArguments([str(name)], max_skipped=1.0, streaming=streaming, shuffle_buffer_size=1)
    training = PVMTrainingArguments(output_dir=str(output_dir), use_cpu=True, max_steps=1)
    data = load_training_data(arguments, training, processor, False, Console(quiet=True))
    if isinstance(data, ConversationStream):
        for _ in zip(range(4), data):
            pass
    file = output_dir / ("skipped_rows-0-0.jsonl" if streaming else "skipped_rows.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


BROKEN = {
    "lines.jsonl": b"%s\n\n%s\n%s\n%s\n%s\n",
    "list.json": b"[%s,\n\n%s,\n%s,\n%s,\n%s]",
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["lines.jsonl", "list.json"])
def test_one_byte_and_one_key_are_bad_rows_in_their_place(name, streaming, processor, tmp_path):
    """Rows count from 0 and lines from 1, in messages and in the list of skipped rows."""
    latin = row("caf%").encode().replace(b"%", b"\xe9")
    twice = b'{"prompt": "a", "prompt": "What?", "completion": "1"}'
    nested = b'{"prompt": "a", "completion": [{"role": "assistant", "content": "a", "content": "b"}]}'
    rows = (row("1").encode(), latin, twice, nested, row("2").encode())
    (tmp_path / name).write_bytes(BROKEN[name] % rows)
    listed = skipped(tmp_path / name, processor, tmp_path / "run", streaming)
    byte = latin.index(b"\xe9") + 1
    expected = [
        (1, 3, f"byte {byte} of the row, 0xe9, is not UTF-8. Save the file as UTF-8."),
        (2, 4, "an object has the key `prompt` twice. Remove one."),
        (3, 5, "an object has the key `content` twice. Remove one."),
    ]
    assert [(row["row"], row["line"], row["problem"]) for row in listed] == expected
    assert {row["file"] for row in listed} == {str(tmp_path / name)}

    rows = load_conversations(str(tmp_path / name), "train")
    with pytest.raises(UserError, match="0xe9, is not UTF-8"):
        rows[1]
    assert rows.where(1).endswith(f"{name}, row 1 (line 3)")


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_file_in_another_encoding_is_refused(encoding, tmp_path):
    content = json.dumps({"prompt": "é", "completion": "é"}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_text(content, encoding=encoding)
    with pytest.raises(UserError, match=r"line 1 of .*rows.jsonl: byte \d+ of the row, 0x(ff|e9), is not UTF-8"):
        load_conversations(str(tmp_path / "rows.jsonl"), "train")


def test_a_row_of_a_folder_is_named_with_its_file(tmp_path):
    (tmp_path / "a-train.jsonl").write_text(row("1") + "\n")
    (tmp_path / "b-train.jsonl").write_text("\n" + row("2") + "\n")
    rows = load_conversations(str(tmp_path), "train")
    assert rows.where(1) == f"{tmp_path}, row 1 (line 2 of {tmp_path / 'b-train.jsonl'})"


def test_only_data_files_are_looked_at_for_splits(tmp_path, monkeypatch):
    """`datasets` looks through a folder many times, which took a minute with 50,000 images."""
    folder = tmp_path / "data [1] set"
    data = ("train.jsonl", "more/test-0.jsonl")
    for name in (*data, ".hidden/train.jsonl", "0.png", "more/1.png", "README.md", "a.json.bak"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(row(name))
    seen = []

    def patterns(path: str):
        seen.extend(str(file.relative_to(path)) for file in Path(path).rglob("*") if file.is_file())
        return datasets.data_files.get_data_patterns(path)

    monkeypatch.setattr(sources, "get_data_patterns", patterns)
    assert answers(folder) == ["train.jsonl"] and answers(folder, "test") == ["more/test-0.jsonl"]
    assert set(seen) == set(data)
    assert answers(folder / "train.jsonl") == ["train.jsonl"]


def test_a_link_to_the_folder_does_not_repeat_its_rows(tmp_path):
    (tmp_path / "train.jsonl").write_text(row("1"))
    (tmp_path / "again").symlink_to(tmp_path)
    assert answers(tmp_path) == ["1"]


def test_a_pipe_is_not_a_data_file(tmp_path):
    for name in ("rows.jsonl", "rows"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match="is neither a file nor a folder"):
            load_conversations(str(tmp_path / name), "train")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "train.jsonl")
    with pytest.raises(UserError, match="contains no .json, .jsonl, .parquet file"):
        load_conversations(str(tmp_path / "folder"), "train")
