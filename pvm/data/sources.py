"""Where conversations come from: files, folders and the Hub, several mixed, read at once or as a stream."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    LargeList,
    List,
    Value,
    Video,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
)
from datasets.data_files import DataFilesDict, get_data_patterns

from pvm.data.forms import Conversation, check_columns, to_conversation
from pvm.data.json_rows import JSON_ROW, load_json, parsed
from pvm.errors import UserError


FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
FIRST_ROWS = 100  # of a JSON file: what columns it has is seen from these


@dataclass
class DataArguments:
    """The conversations to learn from."""

    dataset_name: list[str] = field(
        metadata={
            "help": "One or several data sets: .json, .jsonl or .parquet files, folders of those, or Hub names. "
            "docs/data.md shows the forms that rows may have."
        }
    )
    dataset_config: list[str] | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set; one, or one for each data set."}
    )
    dataset_split: list[str] = field(
        default_factory=lambda: ["train"],
        metadata={"help": "E.g. `train` or `train[:1000]`; one, or one for each data set."},
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "How often each data set is drawn from, e.g. 0.7 0.3. By default all rows of all are used once."
        },
    )
    stopping_strategy: str = field(
        default="first_exhausted",
        metadata={
            "help": "With weights, when an epoch ends: when the first data set has been used up (no row comes twice; "
            "the others' last rows do not come), or when all have (rows of the small ones come again).",
            "choices": ("first_exhausted", "all_exhausted"),
        },
    )
    max_samples: list[int] | None = field(
        default=None,
        metadata={
            "help": "Use so many rows only, spread evenly over the data set (of a stream the first ones); one number, "
            "or one for each data set."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the rows while training instead of preparing them; needs --max_steps."},
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Rows of a stream that are shuffled at a time; 1 keeps their order."}
    )
    train_on: str = field(
        default="all",
        metadata={"help": "The assistant's turns that are learned: all, or the last.", "choices": ("all", "last")},
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest conversation in tokens. Longer ones are skipped; nothing is cut."}
    )
    max_skipped: float = field(
        default=0.01,
        metadata={
            "help": "Largest share of rows that may be skipped because they cannot be used. More stops the run: a "
            "hundredth is what large collections lose to broken files, more is a wrong folder, column or max_length."
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Check all rows, show what they are, and stop before a model is loaded."}
    )
    preprocessing_num_workers: int = field(default=1, metadata={"help": "Processes that check rows before training."})
    overwrite_cache: bool = field(
        default=False,
        metadata={"help": "Check all rows again, e.g. because image files changed and their names did not."},
    )

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: for flags that contradict one another.
        """
        count, weights = len(self.dataset_name), self.dataset_weights
        for flag, values in (
            ("dataset_config", self.dataset_config),
            ("dataset_split", self.dataset_split),
            ("max_samples", self.max_samples),
        ):
            if values is not None and len(values) not in (1, count):
                raise UserError(f"--{flag} has {len(values)} values for {count} data sets. Give one, or one for each.")
        if weights is not None and (len(weights) != count or count == 1 or min(weights) <= 0):
            raise UserError(
                f"--dataset_weights {' '.join(map(str, weights))}: give each of several data sets a number above 0; "
                f"there are {count} in --dataset_name."
            )
        if weights is None and self.stopping_strategy != "first_exhausted":
            raise UserError("--stopping_strategy belongs to --dataset_weights: without, every row comes once.")
        if not 0 <= self.max_skipped <= 1:
            raise UserError(f"--max_skipped {self.max_skipped}: give a share from 0 to 1.")
        for flag, value in (
            ("max_samples", min(self.max_samples or [1])),
            ("max_length", 1 if self.max_length is None else self.max_length),
            ("preprocessing_num_workers", self.preprocessing_num_workers),
            ("shuffle_buffer_size", self.shuffle_buffer_size),
        ):
            if value < 1:
                raise UserError(f"--{flag} {value}: give a number from 1.")
        if self.streaming and count > 1 and weights is None:
            raise UserError(
                "--streaming true with several data sets needs --dataset_weights: their sizes are not known."
            )
        if self.streaming and self.dry_run:
            raise UserError("--dry_run reads all rows, and --streaming is for data too large for that. Leave one out.")


class Conversations:
    """
    Rows of one data set, each read as a [`Conversation`] when it is asked for.

    Args:
        name (`str`): how messages call the data set.
        dataset (`datasets.Dataset`): the rows in any of the known forms.
        folder (`Path`, *optional*): where relative paths of images and videos start.
        rows (`Sequence[int]`, *optional*): which rows; all by default.
    """

    def __init__(self, name: str, dataset: Dataset, folder: Path | None = None, rows: Sequence[int] | None = None):
        self.name = name
        # Images are not decoded with the row, where an error could not be laid to one of them.
        self.dataset = dataset.with_format("arrow")
        self.features = Features(undecoded(dataset.features))
        self.folder = folder
        self.rows = range(len(dataset)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        """
        Raises:
            UserError: saying what is wrong with the row, not which it is; see `where`.
        """
        (row,) = self.dataset[self.rows[index]].to_pylist()
        return to_conversation(parsed(self.features.decode_example(row)), self.folder)

    def where(self, index: int) -> str:
        """The data set and its row, for messages."""
        return f"{self.name}, row {self.rows[index]}"

    def select(self, indices: Sequence[int]) -> "Conversations":
        """Some of the rows; they keep their numbers."""
        return Conversations(self.name, self.dataset, self.folder, [self.rows[index] for index in indices])

    def sample(self, count: int | None) -> "Conversations":
        """At most `count` of the rows, spread evenly."""
        if count is None or count >= len(self):
            return self
        return self.select([k * len(self) // count for k in range(count)])

    @property
    def columns(self) -> list[str]:
        """
        The names of the columns; of JSON files, whose rows may differ, those of the first rows.

        Raises:
            UserError: if none of them can be read.
        """
        if self.features != JSON_ROW:
            return self.dataset.column_names
        return _keys(self.dataset.with_format(None))

    def column(self, name: str) -> list:
        """The values of a column of the data set in these rows, `None` where there is none."""
        dataset = self.dataset.with_format(None).select(self.rows)
        if self.features == JSON_ROW:
            return [_value(row, name) for row in dataset]
        return dataset[name][:] if name in dataset.column_names else [None] * len(dataset)


def _keys(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The columns of the first rows. A row that is no JSON has none; if all are, that is raised."""
    keys, problem = {}, None
    for row in islice(rows, FIRST_ROWS):
        try:
            keys |= dict.fromkeys(parsed(row))
        except UserError as error:
            problem = problem or error
    if problem is not None and not keys:
        raise problem
    return list(keys)


def _value(row: dict[str, Any], name: str) -> Any:
    try:
        return parsed(row).get(name)
    except UserError:
        return None  # the row itself is refused when it is used


def undecoded(feature: Any) -> Any:
    """A type of `datasets` with images and videos as files in place of pictures, `{"path", "bytes"}`."""
    if isinstance(feature, dict):
        return {key: undecoded(value) for key, value in feature.items()}
    if isinstance(feature, (List, LargeList)):
        return replace(feature, feature=undecoded(feature.feature))
    return replace(feature, decode=False) if isinstance(feature, (Image, Video)) else feature


class Mixture:
    """
    Several data sets as one.

    Args:
        parts (`Sequence[Conversations]`): the data sets.
        weights (`Sequence[float]`, *optional*): how often each is drawn from; by default one comes after the other.
        stopping_strategy (`str`): "first_exhausted" or "all_exhausted", as in `datasets.interleave_datasets`.
        seed (`int`): of the drawing.
    """

    def __init__(
        self,
        parts: Sequence[Conversations],
        weights: Sequence[float] | None = None,
        stopping_strategy: str = "first_exhausted",
        seed: int = 0,
    ):
        self.parts = parts
        # Not the rows are mixed, whose columns may differ, but their places.
        filled = [number for number, part in enumerate(parts) if len(part)]
        places = [
            Dataset.from_dict({"part": [number] * len(parts[number]), "index": range(len(parts[number]))})
            for number in filled
        ]
        self.places: list[tuple[int, int]] = []
        if filled:
            shares = weights and [weights[number] for number in filled]
            mixed = mix(places, shares, stopping_strategy, seed)
            self.places = list(zip(mixed["part"][:], mixed["index"][:]))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Conversation:
        part, row = self.places[index]
        return self.parts[part][row]

    def where(self, index: int) -> str:
        """The data set and its row, for messages."""
        part, row = self.places[index]
        return self.parts[part].where(row)


def mix(
    datasets: list[Dataset] | list[IterableDataset], weights: Sequence[float] | None, stopping_strategy: str, seed: int
) -> Dataset | IterableDataset:
    """Data sets with equal columns as one: drawn from by weight, or one after the other."""
    if weights is None:
        return concatenate_datasets(datasets)
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(datasets, probabilities=shares, seed=seed, stopping_strategy=stopping_strategy)


def load_conversations(name: str, split: str, config_name: str | None = None) -> Conversations:
    """
    Load a data set of conversations in any of the known forms.

    Args:
        name (`str`): a .json, .jsonl or .parquet file, a folder of those, or a data set on the Hub.
        split (`str`): e.g. "train", "test", "train[:1000]". A single file has one split, "train".
        config_name (`str`, *optional*): configuration of a data set on the Hub.

    Raises:
        UserError: if there is no such data set or split, it is empty, or its columns are of no known form.
    """
    dataset = _load(name, split, config_name, streaming=False)
    if len(dataset) == 0:
        raise UserError(f"{name}, split {split}, has no rows.")
    conversations = Conversations(name, dataset, _folder(name))
    _check_columns(name, conversations.columns)
    return conversations


def load_sources(arguments: DataArguments) -> list[Conversations]:
    """The data sets of a command line, without those of their rows that are not asked for."""
    sources = []
    for label, name, config_name, split, count in _each(arguments):
        source = load_conversations(name, split, config_name).sample(count)
        source.name = label
        sources.append(source)
    return sources


def _each(arguments: DataArguments) -> Iterator[tuple[str, str, str | None, str, int | None]]:
    """For each data set what messages call it, its name, configuration, split and number of rows."""
    names = arguments.dataset_name

    def spread(values: list | None) -> list:
        return len(names) * (values or [None]) if len(values or [None]) == 1 else values

    for name, config_name, split, count in zip(
        names, spread(arguments.dataset_config), spread(arguments.dataset_split), spread(arguments.max_samples)
    ):
        label = name if names.count(name) == 1 else f"{name} ({', '.join(filter(None, (config_name, split)))})"
        yield label, name, config_name, split, count


def _folder(name: str) -> Path | None:
    """Where the relative paths of a local data set start; `None` for one on the Hub."""
    path = Path(name).absolute()
    return (path.parent if path.is_file() else path) if path.exists() else None


def _check_columns(name: str, columns: Sequence[str]) -> None:
    try:
        check_columns(columns)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _load(name: str, split: str, config_name: str | None, streaming: bool) -> Dataset | IterableDataset:
    path = Path(name)
    if path.suffix in FILE_FORMATS and not path.exists():
        raise UserError(f"{name}: no such file.")
    if path.is_file() and path.suffix not in FILE_FORMATS:
        raise UserError(f"{name}: a data file must end in one of {', '.join(FILE_FORMATS)}.")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{name} is empty.")
    if path.exists() and config_name is not None:
        raise UserError(f"--dataset_config {config_name}: {name} is a local data set, which has no configurations.")
    try:
        if not path.exists():
            dataset = load_dataset(name, config_name, split=split, streaming=streaming)
        else:
            file_format, files = (FILE_FORMATS[path.suffix], str(path)) if path.is_file() else _folder_files(path)
            if file_format == "json":
                dataset = load_json(files, split, streaming)
            else:
                dataset = load_dataset(file_format, data_files=files, split=split, streaming=streaming)
    except UserError:
        raise
    except Exception as error:  # `datasets` raises whatever its readers raise
        reason = str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"Cannot load split `{split}` of the data set `{name}`: {reason}") from error
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        raise UserError(f"{name}: name one split of {', '.join(dataset)}.")
    return dataset


def _folder_files(path: Path) -> tuple[str, dict[str, list[str]]]:
    """The format of a folder's data files, and the files by split, without the images that lie beside them."""
    patterns = get_data_patterns(str(path))
    files = DataFilesDict.from_patterns(patterns, base_path=str(path), allowed_extensions=list(FILE_FORMATS))
    files = {split: [str(file) for file in found] for split, found in files.items() if found}
    formats = {FILE_FORMATS[Path(file).suffix] for found in files.values() for file in found}
    if len(formats) != 1:
        found = "both JSON and Parquet files" if formats else f"no {', '.join(FILE_FORMATS)} file"
        raise UserError(f"{path} holds {found}. Name one file.")
    return formats.pop(), files


# Streams

_FILE = {"path": Value("string"), "bytes": Value("binary")}
# A conversation and where it comes from, the same for all forms, so that streams of several can be mixed.
RECORD = Features(
    {
        "dataset": Value("string"),
        "row": Value("int64"),
        "problem": Value("string"),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List(_FILE),
        "videos": List({**_FILE, "frames": List(_FILE)}),
        "given": Value("int64"),
    }
)


def load_streams(arguments: DataArguments) -> list[IterableDataset]:
    """The data sets of a command line as streams of rows with the columns of `RECORD`, in the order of their rows."""
    streams = []
    for label, name, config_name, split, count in _each(arguments):
        stream = _load(name, split, config_name, streaming=True)
        if stream.features is not None:
            stream = stream.decode(False).cast(Features(undecoded(stream.features)))
        first = next(iter(stream), None)
        if first is None:
            raise UserError(f"{name}, split {split}, has no rows.")
        _check_columns(name, _keys(stream) if first.keys() == JSON_ROW.keys() else list(first))
        stream = stream if count is None else stream.take(count)
        streams.append(
            stream.map(
                _to_record,
                with_indices=True,
                remove_columns=list(first),
                features=RECORD,
                fn_kwargs={"name": label, "folder": _folder(name)},
            )
        )
    return streams


def read_streams(
    streams: Sequence[IterableDataset], arguments: DataArguments, seed: int, reader: int = 0, readers: int = 1
) -> Iterator[dict[str, Any]]:
    """
    One pass of one of several readers through [`load_streams`]: its own share of each, shuffled and mixed.

    Args:
        seed (`int`): of the order, the same for all readers of a pass.
        reader (`int`): which of the `readers`, the processes and their workers, from 0.
    """
    whole = arguments.max_samples is None  # else the first rows are wanted, not the first of each file
    shares = [_share(stream, reader, readers, by_files=whole) for stream in streams]
    if arguments.shuffle_buffer_size > 1:
        shares = [share.shuffle(seed=seed, buffer_size=arguments.shuffle_buffer_size) for share in shares]
    mixed = mix(shares, arguments.dataset_weights, arguments.stopping_strategy, seed)
    return _in_one_process(mixed)


def _share(stream: IterableDataset, reader: int, readers: int, by_files: bool) -> IterableDataset:
    """
    Whole files if there are enough, else every `readers`-th row: then all readers have one if there are as many rows.
    """
    if by_files and stream.num_shards >= readers:
        files = stream.shard(readers, reader)
        if next(_in_one_process(files), None) is not None:  # files may be without a row
            return files
    return stream.filter(lambda record: record["row"] % readers == reader)


def _in_one_process(stream: IterableDataset) -> Iterator[dict[str, Any]]:
    """All rows. In a worker of a `DataLoader`, iterating over the stream itself would share them out by files."""
    for batch in stream.iter(batch_size=1):
        yield {key: value for key, (value,) in batch.items()}


def _to_record(row: dict[str, Any], index: int, name: str, folder: Path | None) -> dict[str, Any]:
    try:
        return {"dataset": name, "row": index, "problem": None, **asdict(to_conversation(parsed(row), folder))}
    except UserError as error:
        return {"dataset": name, "row": index, "problem": str(error), **asdict(Conversation([]))}


def from_record(record: dict[str, Any]) -> Conversation:
    if record["problem"] is not None:
        raise UserError(record["problem"])
    for message in record["messages"]:
        for part in message["content"]:
            if part["type"] != "text":
                part.pop("text", None)
    return Conversation(record["messages"], record["images"], record["videos"], record["given"])
