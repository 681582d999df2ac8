"""
Rows of local JSON files, kept as the JSON text that they are until one is asked for.

`datasets`' own reader makes columns of them. Where a column mixes strings and lists, as contents of messages do, that
turns a string such as "7" or "true" into a number or a truth value, and takes the quotes off a quoted one.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetInfo, Features, GeneratorBasedBuilder, IterableDataset, SplitGenerator, Value
from datasets.fingerprint import Hasher

from pvm.errors import UserError


JSON_ROW = Features({"file": Value("string"), "line": Value("int64"), "json": Value("string")})
WHITESPACE = re.compile(r"[ \t\r\n]*")


class JsonRows(GeneratorBasedBuilder):
    """Files of JSON Lines, of one list, or of objects one after the other, as a data set of `JSON_ROW`s."""

    def _info(self) -> DatasetInfo:
        return DatasetInfo(features=JSON_ROW)

    def _split_generators(self, dl_manager) -> list[SplitGenerator]:
        return [
            SplitGenerator(split, gen_kwargs={"files": list(files)}) for split, files in self.config.data_files.items()
        ]

    def _generate_examples(self, files: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, file in enumerate(files):
            for index, (line, text) in enumerate(json_texts(file)):
                yield f"{number},{index}", {"file": file, "line": line, "json": text}


def load_json(data_files: str | dict[str, list[str]], split: str, streaming: bool) -> Dataset | IterableDataset:
    """
    Local JSON files as a data set of `JSON_ROW`s, cached as `datasets` caches what it reads.

    Args:
        data_files (`str` or `dict[str, list[str]]`): a file, or the files of each split.
    """
    code = Path(__file__).read_text("utf-8")
    builder = JsonRows(data_files=data_files, hash=Hasher.hash(code))  # the cache of another version is not read
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def json_texts(file: str) -> Iterator[tuple[int, str]]:
    """
    The rows of a file and the lines, from 1, where they begin; blank lines are none. JSON Lines are not looked into
    here: a broken line is one bad row.

    Raises:
        UserError: if the file is not UTF-8, or is a list or objects over several lines and broken.
    """
    try:
        with open(file, encoding="utf-8-sig") as stream:
            first = ""
            while not first and (beginning := stream.readline(1000)):  # a line may be a list of a gigabyte
                first = beginning.strip()
            stream.seek(0)
            if first.startswith("[") or first == "{":
                yield from _values(stream.read())
            else:
                yield from ((number, line.strip()) for number, line in enumerate(stream, start=1) if line.strip())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON: {error}.") from error


def _values(text: str) -> Iterator[tuple[int, str]]:
    """The values in a list, or one after the other. Only one at a time is an object in memory."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    start = WHITESPACE.match(text).end()
    listed = text.startswith("[", start)
    if listed:
        start = WHITESPACE.match(text, start + 1).end()
    while start < len(text) and not (listed and text[start] == "]"):
        _, end = decoder.raw_decode(text, start)
        line, counted = line + text.count("\n", counted, start), start
        yield line, text[start:end]
        start = WHITESPACE.match(text, end).end()
        if listed and text.startswith(",", start):
            start = WHITESPACE.match(text, start + 1).end()
    if listed and text[start:].strip() != "]":
        raise json.JSONDecodeError("Expecting the end of the list, and of the file", text, start)


def parsed(row: dict[str, Any]) -> dict[str, Any]:
    """
    A row of a data set as its file has it: a `JSON_ROW` is read, any other is that already.

    Raises:
        UserError: naming file and line, if there is no JSON object.
    """
    if row.keys() != JSON_ROW.keys():
        return row
    place = f"line {row['line']} of {row['file']}"
    try:
        value = json.loads(row["json"])
        if "\\ud" in row["json"].lower():  # half a character, which nothing could tokenize or write down
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{place} is no JSON: {reason}. Mend or remove it.") from error
    if not isinstance(value, dict):
        raise UserError(f"{place} is no JSON object, but {row['json'][:60]}. Mend or remove it.")
    return value
