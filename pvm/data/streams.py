"""Data sets too large to check before training: their rows are read, checked, shuffled and encoded during it."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Features, IterableDataset, List, Value

from pvm.data.encoding import ConversationEncoder, content_digest
from pvm.data.forms import Conversation, check_columns, to_conversation
from pvm.data.json_rows import JSON_ROW, json_columns, json_origin, parse_row, place
from pvm.data.sources import DataArguments, load_rows, media_root, mix, undecoded
from pvm.errors import SetupError, UserError, user_errors


WATCH_AFTER = 500  # rows of a stream before its share of unusable ones is judged
FINGERPRINT_ROWS = 100  # of each stream
ORIGIN = ("dataset", "row", "file", "line")
_FILE = {"path": Value("string"), "bytes": Value("binary")}
# A conversation with its origin: columns that are the same for all forms, so that streams can be mixed.
RECORD = Features(
    {
        "dataset": Value("string"),
        "row": Value("int64"),
        "file": Value("string"),
        "line": Value("int64"),
        "problem": Value("string"),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List(_FILE),
        "videos": List({**_FILE, "frames": List(_FILE)}),
        "prompt_messages": Value("int64"),
    }
)


def load_streams(arguments: DataArguments) -> list[IterableDataset]:
    """
    Open the data sets of a command line as streams of `RECORD`s, in the order of their rows.

    Raises:
        UserError: if a data set or split does not exist, is empty, or matches no supported form.
    """
    streams = []
    for source in arguments.sources():
        stream = load_rows(source.name, source.split, source.config_name, streaming=True)
        if stream.features is not None:
            stream = stream.decode(False).cast(undecoded(stream.features))
        with user_errors(f"Cannot read the data set {source.name}"):
            first = next(iter(stream), None)
        if first is None:
            raise UserError(f"{source.name}, split {source.split}, has no rows.")
        check_columns(source.name, json_columns(stream) if first.keys() == JSON_ROW.keys() else list(first))
        if source.max_samples is not None:
            stream = stream.take(source.max_samples)
        streams.append(
            stream.map(
                _to_record,
                with_indices=True,
                remove_columns=list(first),
                features=RECORD,
                fn_kwargs={
                    "name": source.label,
                    "root": media_root(source.name, source.image_root),
                    "allow_urls": arguments.allow_image_urls,
                },
            )
        )
    return streams


def read_streams(
    streams: Sequence[IterableDataset], arguments: DataArguments, seed: int, reader: int = 0, readers: int = 1
) -> Iterator[dict[str, Any]]:
    """
    One pass of one reader through [`load_streams`]: its share of each stream, shuffled and mixed.

    Args:
        seed (`int`): seed of the order, the same for all readers of a pass.
        reader (`int`): index of this reader. `readers` are the processes, or all their data loader workers.
    """
    # `--max_samples` takes the first rows of a data set, not of each of its files.
    by_files = arguments.max_samples is None
    shares = [_share(stream, reader, readers, by_files) for stream in streams]
    if arguments.shuffle_buffer_size > 1:
        shares = [share.shuffle(seed=seed, buffer_size=arguments.shuffle_buffer_size) for share in shares]
    return _rows(mix(shares, arguments.dataset_weights, arguments.stopping_strategy, seed))


def stream_fingerprint(streams: Sequence[IterableDataset]) -> str:
    """What the first rows of [`load_streams`] contain, for [`ConversationStream`]."""
    digest = hashlib.sha256()
    for stream in streams:
        for record in stream.take(FINGERPRINT_ROWS):
            try:
                digest.update(content_digest(_from_record(record)).encode())
            except UserError:
                digest.update(b"unusable")
    return f"{len(streams)} streams that begin with {digest.hexdigest()[:16]}"


class ConversationStream(torch.utils.data.IterableDataset):
    """
    The rows of [`load_streams`] as model inputs, repeated without end: readers have different numbers of usable rows,
    and none may run out before the others. `--max_steps` ends the training.

    Unusable rows are skipped and reported in `skipped_rows-RANK-WORKER.jsonl`, one file per reader. Where a reader has
    files of its own, `row` counts within those.

    Args:
        streams (`Sequence[datasets.IterableDataset]`): the data sets.
        encoder (`ConversationEncoder`): encodes their rows.
        arguments (`DataArguments`): how they are mixed, and how many rows may be skipped.
        output_dir (`str` or `Path`): folder of the reports.
        seed (`int`): seed of the order.
        rank, world_size (`int`): of this process.
        fingerprint (`str`, *optional*): see [`pvm.data.encoding.ConversationDataset`].
    """

    def __init__(
        self,
        streams: Sequence[IterableDataset],
        encoder: ConversationEncoder,
        arguments: DataArguments,
        output_dir: str | Path,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        fingerprint: str | None = None,
    ):
        self.streams = streams
        self.encoder = encoder
        self.arguments = arguments
        self.output_dir = Path(output_dir)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.fingerprint = fingerprint

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """
        Yields:
            `dict`: see [`ConversationEncoder`].

        Raises:
            UserError: if too many rows are unusable, judged from `WATCH_AFTER` rows or one pass on.
        """
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        reader, readers = self.rank * workers + worker, self.world_size * workers
        report = self.output_dir / f"skipped_rows-{self.rank}-{worker}.jsonl"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.unlink(missing_ok=True)  # a resumed run reads everything from the start
        seen, skipped, last = 0, 0, {}
        for epoch in itertools.count():
            for record in read_streams(self.streams, self.arguments, self.seed + epoch, reader, readers):
                seen += 1
                try:
                    example = self.encoder(_from_record(record))
                except SetupError:
                    raise
                except UserError as error:
                    skipped += 1
                    origin = {key: record[key] for key in ORIGIN if record[key] is not None}
                    last = {**origin, "problem": str(error)}
                    if epoch == 0:
                        with open(report, "a", encoding="utf-8") as file:
                            file.write(json.dumps(last, ensure_ascii=False) + "\n")
                else:
                    yield example
                if seen >= WATCH_AFTER:
                    self._check_skipped(seen, skipped, last)
            if skipped == seen:
                raise UserError(f"None of the {seen} rows of the stream can be used. {report} gives the reasons.")
            self._check_skipped(seen, skipped, last)

    def _check_skipped(self, seen: int, skipped: int, last: dict[str, Any]) -> None:
        if skipped > self.arguments.max_skipped * seen:
            raise UserError(
                f"{skipped} of the first {seen} rows cannot be used, more than --max_skipped "
                f"{self.arguments.max_skipped:g} allows. {self.output_dir}/skipped_rows-*.jsonl lists them; the last: "
                f"{place(last)}: {last['problem']}"
            )


def _share(stream: IterableDataset, reader: int, readers: int, by_files: bool) -> IterableDataset:
    """Whole files if there are enough; else every `readers`-th row, so that `readers` rows are enough for all."""
    if by_files and stream.num_shards >= readers:
        files = stream.shard(readers, reader)
        if next(_rows(files), None) is not None:  # the files may have no rows
            return files
    return stream.filter(lambda record: record["row"] % readers == reader)


def _rows(stream: IterableDataset) -> Iterator[dict[str, Any]]:
    """All rows of a stream. Plain iteration in a `DataLoader` worker would split its files among the workers again."""
    try:
        for batch in stream.iter(batch_size=1):
            yield {key: value for key, (value,) in batch.items()}
    except (OSError, pa.ArrowException) as error:  # a file is gone or broken, or the connection
        raise UserError(f"A stream cannot be read any further: {' '.join(str(error).split())}") from error


def _to_record(row: dict[str, Any], index: int, name: str, root: Path | None, allow_urls: bool) -> dict[str, Any]:
    try:
        conversation, problem = to_conversation(parse_row(row), root, allow_urls), None
    except UserError as error:
        conversation, problem = Conversation([]), str(error)
    origin = {"dataset": name, "row": index, "file": None, "line": None, **json_origin(row)}
    return {**origin, "problem": problem, **asdict(conversation)}


def _from_record(record: dict[str, Any]) -> Conversation:
    if record["problem"] is not None:
        raise UserError(record["problem"])
    for message in record["messages"]:
        # Images and videos got an empty text, because all parts of a `RECORD` have the same columns.
        message["content"] = [{key: part[key] for key in part if part[key] is not None} for part in message["content"]]
    return Conversation(record["messages"], record["images"], record["videos"], record["prompt_messages"])
