"""
Rows of local JSON files, kept as JSON text until they are used.

`datasets`' own JSON reader infers column types. Where a column mixes strings and lists, as the contents of messages
do, it turns a string such as "7" or "true" into a number or a boolean, and removes quotes.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import ArrowBasedBuilder, Dataset, DatasetInfo, Features, IterableDataset, SplitGenerator, Value
from datasets.fingerprint import Hasher

from pvm.errors import UserError


JSON_ROW = Features({"file": Value("string"), "line": Value("int64"), "json": Value("binary")})
BATCH_ROWS = 100  # that are read at once; with images in data: URIs, they may be large
FIRST_ROWS = 100  # rows that determine which columns a file has
WHITESPACE = re.compile(r"[ \t\r\n]*")


class JsonRows(ArrowBasedBuilder):
    """JSON Lines, a list, or consecutive objects, as a data set of `JSON_ROW`s."""

    def _info(self) -> DatasetInfo:
        return DatasetInfo(features=JSON_ROW)

    def _split_generators(self, dl_manager) -> list[SplitGenerator]:
        return [
            SplitGenerator(split, gen_kwargs={"files": list(files)}) for split, files in self.config.data_files.items()
        ]

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[tuple[int, int], pa.Table]]:
        for number, file in enumerate(files):
            rows = json_texts(file)
            while batch := list(islice(rows, BATCH_ROWS)):
                lines, texts = zip(*batch)
                columns = {"file": [file] * len(batch), "line": lines, "json": texts}
                yield (number, lines[0]), pa.table(columns, schema=JSON_ROW.arrow_schema)


def load_json(data_files: str | dict[str, list[str]], split: str, streaming: bool) -> Dataset | IterableDataset:
    """
    Load local JSON files as a data set of `JSON_ROW`s, in the cache of `datasets`.

    Args:
        data_files (`str` or `dict[str, list[str]]`): a file, or the files of each split.
    """
    code = Path(__file__).read_text("utf-8")
    builder = JsonRows(data_files=data_files, hash=Hasher.hash(code))  # other versions of this file have other caches
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def json_texts(file: str) -> Iterator[tuple[int, bytes]]:
    """
    The rows of a file, each with the number of its first line, from 1. Blank lines are skipped. Rows are not decoded
    and lines of JSON Lines not parsed here, so that a broken line or a byte that is not UTF-8 is one bad row.

    Raises:
        UserError: if the file is a broken list or a broken sequence of objects.
    """
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape") as stream:
            first = ""
            while not first and (beginning := stream.readline(1000)):  # a list of gigabytes may be one line
                first = beginning.strip()
            stream.seek(0)
            if first.startswith("[") or first == "{":
                rows = _values(stream.read())
            else:
                rows = ((number, line.strip()) for number, line in enumerate(stream, start=1) if line.strip())
            yield from ((number, row.encode("utf-8", "surrogateescape")) for number, row in rows)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}.") from error


def _values(text: str) -> Iterator[tuple[int, str]]:
    """The values of a list, or consecutive values. Only one at a time is held as an object."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    start = WHITESPACE.match(text).end()
    is_list = text.startswith("[", start)
    if is_list:
        start = WHITESPACE.match(text, start + 1).end()
    while start < len(text) and not (is_list and text[start] == "]"):
        _, end = decoder.raw_decode(text, start)
        line, counted = line + text.count("\n", counted, start), start
        yield line, text[start:end]
        start = WHITESPACE.match(text, end).end()
        if is_list and text.startswith(",", start):
            start = WHITESPACE.match(text, start + 1).end()
    if is_list and text[start:].strip() != "]":
        raise json.JSONDecodeError("Expecting the end of the list and of the file", text, start)


def parse_row(row: dict[str, Any]) -> dict[str, Any]:
    """
    Parse a `JSON_ROW`; a row of any other kind is returned as it is.

    Raises:
        UserError: if it is not a JSON object in UTF-8, or an object has a key twice. It does not name the row; see
            [`place`].
    """
    if row.keys() != JSON_ROW.keys():
        return row
    try:
        text = row["json"].decode()
        value = json.loads(text, object_pairs_hook=_object)
        if "\\ud" in text.lower():  # half of a surrogate pair can be neither tokenized nor written
            json.dumps(value, ensure_ascii=False).encode()
    except UserError:
        raise
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} of the row, 0x{error.object[error.start]:02x},"
        raise UserError(f"{byte} is not UTF-8. Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"the row is not valid JSON: {reason}. Fix or remove it.") from error
    if not isinstance(value, dict):
        raise UserError(f"the row is not a JSON object: {text[:60]}. Fix or remove it.")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):  # the standard library would keep the last one
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"an object has the key `{twice}` twice. Remove one.")
    return value


def json_origin(row: dict[str, Any]) -> dict[str, Any]:
    """`file` and `line` (from 1) of a `JSON_ROW`; nothing of any other row."""
    return {key: row[key] for key in ("file", "line")} if row.keys() == JSON_ROW.keys() else {}


def place(origin: dict[str, Any]) -> str:
    """
    Where a row is, for messages: "rows.jsonl, row 0 (line 1)".

    Args:
        origin (`dict`): `dataset`, its name; `row`, from 0; and those of [`json_origin`].
    """
    where = f"{origin['dataset']}, row {origin['row']}"
    if "line" not in origin:
        return where
    of_file = "" if Path(origin["file"]).name == Path(origin["dataset"]).name else f" of {origin['file']}"
    return f"{where} (line {origin['line']}{of_file})"


def json_columns(rows: Iterable[dict[str, Any]]) -> list[str]:
    """
    The columns of the first `FIRST_ROWS` rows, each of which may have others. Broken rows have none.

    Raises:
        UserError: if all of these rows are broken.
    """
    columns, first = {}, None
    for row in islice(rows, FIRST_ROWS):
        try:
            columns |= dict.fromkeys(parse_row(row))
        except UserError as error:
            first = first or UserError(f"line {row['line']} of {row['file']}: {error}")
    if first is not None and not columns:
        raise first
    return list(columns)


def json_column(rows: Iterable[dict[str, Any]], name: str) -> list:
    """The values of a column, `None` for rows that do not have it or are broken."""
    values = []
    for row in rows:
        try:
            values.append(parse_row(row).get(name))
        except UserError:  # reported when the row is used
            values.append(None)
    return values
