"""Data sets: files, folders and Hub names loaded as rows, rows read as conversations, several data sets mixed."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    LargeList,
    List,
    Video,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_dataset_builder,
)
from datasets.data_files import DataFilesDict, get_data_patterns

from pvm.data.forms import Conversation, check_columns, to_conversation
from pvm.data.json_rows import JSON_ROW, json_column, json_columns, json_origin, load_json, parse_row, place
from pvm.errors import UserError


FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class Source(NamedTuple):
    """One data set of a command line: `label` is its name in messages, `name` where it is."""

    label: str
    name: str
    config_name: str | None
    split: str
    max_samples: int | None
    image_root: str | None


@dataclass
class DataArguments:
    """The conversations to train on."""

    dataset_name: list[str] = field(
        metadata={
            "help": "One or more data sets: .json, .jsonl or .parquet files, folders of those, or Hub names. "
            "docs/data.md shows the supported forms."
        }
    )
    dataset_config: list[str] | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set; one for all, or one per data set."}
    )
    dataset_split: list[str] = field(
        default_factory=lambda: ["train"],
        metadata={"help": "E.g. `train` or `train[:1000]`; one for all, or one per data set."},
    )
    image_root: list[str] | None = field(
        default=None,
        metadata={
            "help": "Folder or zip file that relative paths of images and videos start from, by default the folder of "
            "the data file; one for all, or one per data set."
        },
    )
    allow_image_urls: bool = field(
        default=False,
        metadata={
            "help": "Fetch images that rows name by http(s) URLs. Only for data that you trust: it could make this "
            "machine call any address it can reach."
        },
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Sampling weight of each data set, e.g. 0.7 0.3. By default, an epoch has every row once."},
    )
    stopping_strategy: str = field(
        default="first_exhausted",
        metadata={
            "help": "With weights, when an epoch ends: when the first data set is exhausted (no row is repeated, some "
            "rows of the others are left out), or when all are (rows of small data sets are repeated).",
            "choices": ("first_exhausted", "all_exhausted"),
        },
    )
    max_samples: list[int] | None = field(
        default=None,
        metadata={
            "help": "Use at most this many rows, spread evenly over the data set (the first ones of a stream); one "
            "number for all, or one per data set."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read rows during training instead of checking all of them before; needs --max_steps."},
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Buffer size for shuffling a stream; 1 keeps the order of its rows."}
    )
    train_on: str = field(
        default="all",
        metadata={"help": "Which of the assistant's turns to train on: all, or the last.", "choices": ("all", "last")},
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Maximum tokens of a conversation. Longer ones are skipped, not truncated."}
    )
    max_skipped: float = field(
        default=0.01,
        metadata={
            "help": "Largest share of unusable rows that are skipped; more stop the run. Large collections have about "
            "a hundredth of broken files; a larger share points to a wrong folder, column or max_length."
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Check all rows, print statistics, and stop before a model is loaded."}
    )
    preprocessing_num_workers: int = field(
        default=1, metadata={"help": "Number of processes that check rows before training."}
    )
    overwrite_cache: bool = field(
        default=False,
        metadata={"help": "Check all rows again, for instance because image files have changed under their names."},
    )

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: for values that are invalid or contradict one another.
        """
        count, weights = len(self.dataset_name), self.dataset_weights
        for flag, values in (
            ("dataset_config", self.dataset_config),
            ("dataset_split", self.dataset_split),
            ("image_root", self.image_root),
            ("max_samples", self.max_samples),
        ):
            if values is not None and len(values) not in (1, count):
                raise UserError(f"--{flag} has {len(values)} values for {count} data sets. Give one, or one for each.")
        if weights is not None and (len(weights) != count or count == 1 or min(weights) <= 0):
            raise UserError(
                f"--dataset_weights {' '.join(map(str, weights))}: give one number above 0 for each of several "
                f"data sets; --dataset_name has {count}."
            )
        if weights is None and self.stopping_strategy != "first_exhausted":
            raise UserError(
                "--stopping_strategy only works with --dataset_weights; without, an epoch has every row once."
            )
        if not 0 <= self.max_skipped <= 1:
            raise UserError(f"--max_skipped {self.max_skipped}: give a number between 0 and 1.")
        for flag, value in (
            ("max_samples", min(self.max_samples or [1])),
            ("max_length", 1 if self.max_length is None else self.max_length),
            ("preprocessing_num_workers", self.preprocessing_num_workers),
            ("shuffle_buffer_size", self.shuffle_buffer_size),
        ):
            if value < 1:
                raise UserError(f"--{flag} {value}: it must be at least 1.")
        if self.streaming and count > 1 and weights is None:
            raise UserError(
                "--streaming true with several data sets needs --dataset_weights, because their sizes are unknown."
            )
        if self.streaming and self.dry_run:
            raise UserError("--dry_run reads all rows, and --streaming does not. Use only one of them.")

    def sources(self) -> list[Source]:
        """The data sets, each with its own configuration, split and number of rows."""
        names = self.dataset_name
        columns = (
            values * len(names) if len(values) == 1 else values
            for values in (
                self.dataset_config or [None],
                self.dataset_split,
                self.max_samples or [None],
                self.image_root or [None],
            )
        )
        sources = []
        for name, config_name, split, *rest in zip(names, *columns):
            label = name if names.count(name) == 1 else f"{name} ({', '.join(filter(None, (config_name, split)))})"
            sources.append(Source(label, name, config_name, split, *rest))
        return sources


class Conversations:
    """
    Rows of one data set, converted to [`Conversation`]s on access.

    Args:
        name (`str`): the name of the data set in messages.
        dataset (`datasets.Dataset`): rows of any supported form.
        root (`Path`, *optional*): the folder or zip file that relative paths of images and videos start from.
        allow_image_urls (`bool`): fetch images that rows name by http(s) URLs.
        rows (`Sequence[int]`, *optional*): the rows to use; all by default.
    """

    def __init__(
        self,
        name: str,
        dataset: Dataset,
        root: Path | None = None,
        allow_image_urls: bool = False,
        rows: Sequence[int] | None = None,
    ):
        self.name = name
        # Images are decoded one by one in encoding, so that the error for a broken one can name it.
        self.dataset = dataset.with_format("arrow")
        self.features = undecoded(dataset.features)
        self.root = root
        self.allow_image_urls = allow_image_urls
        self.rows = range(len(dataset)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        """
        Raises:
            UserError: if the row is invalid. The message does not name the row; see `where`.
        """
        return to_conversation(parse_row(self._row(index)), self.root, self.allow_image_urls)

    def _row(self, index: int) -> dict[str, Any]:
        (row,) = self.dataset[self.rows[index]].to_pylist()
        return self.features.decode_example(row)

    def origin(self, index: int) -> dict[str, Any]:
        """Where a row is: `dataset`, `row` (its number, from 0), and in JSON files `file` and `line` (from 1)."""
        origin = {"dataset": self.name, "row": self.rows[index]}
        return {**origin, **json_origin(self._row(index))} if self._is_json else origin

    def where(self, index: int) -> str:
        """The same, for messages."""
        return place(self.origin(index))

    def select(self, indices: Sequence[int]) -> "Conversations":
        """A subset, in which rows keep their numbers."""
        rows = [self.rows[index] for index in indices]
        return Conversations(self.name, self.dataset, self.root, self.allow_image_urls, rows)

    def sample(self, count: int | None) -> "Conversations":
        """At most `count` rows, spread evenly."""
        if count is None or count >= len(self):
            return self
        return self.select([k * len(self) // count for k in range(count)])

    @property
    def columns(self) -> list[str]:
        """
        The column names; for JSON files, whose rows may differ, those of the first rows.

        Raises:
            UserError: if none of these rows is valid JSON.
        """
        return json_columns(self.dataset.with_format(None)) if self._is_json else self.dataset.column_names

    def column(self, name: str) -> list:
        """The values of a column, `None` for rows without it."""
        dataset = self.dataset.with_format(None).select(self.rows)
        if self._is_json:
            return json_column(dataset, name)
        return dataset[name][:] if name in dataset.column_names else [None] * len(dataset)

    @property
    def _is_json(self) -> bool:
        return self.features == JSON_ROW


class Mixture:
    """
    Several data sets as one.

    Args:
        parts (`Sequence[Conversations]`): the data sets.
        weights (`Sequence[float]`, *optional*): their sampling weights; without, they are concatenated.
        stopping_strategy (`str`): "first_exhausted" or "all_exhausted", as in `datasets.interleave_datasets`.
        seed (`int`): seed of the sampling.

    Attributes:
        places (`list[tuple[int, int]]`): for each row of the mixture, its part and its index there.
    """

    def __init__(
        self,
        parts: Sequence[Conversations],
        weights: Sequence[float] | None = None,
        stopping_strategy: str = "first_exhausted",
        seed: int = 0,
    ):
        self.parts = parts
        self.places: list[tuple[int, int]] = []
        # `mix` needs equal columns, which rows of different data sets may not have: their places are mixed instead.
        filled = [number for number, part in enumerate(parts) if len(part)]
        if filled:
            mixed = mix(
                [
                    Dataset.from_dict({"part": [number] * len(parts[number]), "index": range(len(parts[number]))})
                    for number in filled
                ],
                weights and [weights[number] for number in filled],
                stopping_strategy,
                seed,
            )
            self.places = list(zip(mixed["part"][:], mixed["index"][:]))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Conversation:
        part, row = self.places[index]
        return self.parts[part][row]

    def where(self, index: int) -> str:
        """Data set and row number, for messages."""
        part, row = self.places[index]
        return self.parts[part].where(row)


def mix(
    datasets: list[Dataset] | list[IterableDataset], weights: Sequence[float] | None, stopping_strategy: str, seed: int
) -> Dataset | IterableDataset:
    """Combine data sets with equal columns: sampled by weight, or concatenated."""
    if weights is None:
        return concatenate_datasets(datasets)
    probabilities = [weight / sum(weights) for weight in weights]
    return interleave_datasets(datasets, probabilities=probabilities, seed=seed, stopping_strategy=stopping_strategy)


def load_sources(arguments: DataArguments) -> list[Conversations]:
    """Load the data sets of a command line, each reduced to its `--max_samples`."""
    loaded = []
    for source in arguments.sources():
        conversations = load_conversations(
            source.name, source.split, source.config_name, source.image_root, arguments.allow_image_urls
        )
        conversations.name = source.label
        loaded.append(conversations.sample(source.max_samples))
    return loaded


def load_conversations(
    name: str,
    split: str,
    config_name: str | None = None,
    image_root: str | None = None,
    allow_image_urls: bool = False,
) -> Conversations:
    """
    Load a data set of conversations in any of the supported forms.

    Args:
        name (`str`): a .json, .jsonl or .parquet file, a folder of those, or a data set on the Hub.
        split (`str`): e.g. "train", "test", "train[:1000]". A single file has one split, "train".
        config_name (`str`, *optional*): configuration of a data set on the Hub.
        image_root (`str`, *optional*): the folder or zip file that relative paths of images and videos start from;
            the folder of the data file by default.
        allow_image_urls (`bool`): fetch images that rows name by http(s) URLs.

    Raises:
        UserError: if the data set, split or root does not exist, is empty, or matches no supported form.
    """
    dataset = load_rows(name, split, config_name)
    if len(dataset) == 0:
        raise UserError(f"{name}, split {split}, has no rows.")
    conversations = Conversations(name, dataset, media_root(name, image_root), allow_image_urls)
    check_columns(name, conversations.columns)
    return conversations


def load_rows(
    name: str, split: str, config_name: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """
    Load the rows of a data set as they are; local JSON files as `JSON_ROW`s.

    Raises:
        UserError: if the data set or split does not exist or cannot be read.
    """
    path = Path(name)
    if path.suffix in FILE_FORMATS and not path.exists():
        raise UserError(f"{name}: no such file.")
    if path.is_file() and path.suffix not in FILE_FORMATS:
        raise UserError(f"{name}: a data file must end in one of {', '.join(FILE_FORMATS)}.")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{name} is neither a file nor a folder. Save the rows to a file.")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{name} is empty.")
    if path.exists() and config_name is not None:
        raise UserError(f"--dataset_config {config_name}: {name} is a local data set, which has no configurations.")
    try:
        if not path.exists():
            builder = load_dataset_builder(name, config_name)
            files = builder.config.data_files or {}
            rows = {key: [file for file in files[key] if file.endswith(".parquet")] for key in files}
            if builder.name == "parquet" and rows != files:  # archives of images beside them would be read as Parquet
                builder = load_dataset_builder("parquet", data_files=rows)
            if not streaming:
                builder.download_and_prepare()
            dataset = builder.as_streaming_dataset(split) if streaming else builder.as_dataset(split)
        else:
            file_format, files = (
                (FILE_FORMATS[path.suffix], escape(str(path))) if path.is_file() else _folder_files(path)
            )
            if file_format == "json":
                dataset = load_json(files, split, streaming)
            else:
                dataset = load_dataset(file_format, data_files=files, split=split, streaming=streaming)
    except UserError:
        raise
    except Exception as error:  # the readers of `datasets` raise exceptions of many types
        lines = str(error.__cause__ or error).strip().splitlines()[:2]  # the second may list the configurations
        reason = " ".join(lines) or type(error).__name__
        raise UserError(f"Cannot load split `{split}` of the data set `{name}`: {reason}") from error
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        raise UserError(f"{name}: choose one of the splits {', '.join(dataset)}.")
    return dataset


def media_root(name: str, image_root: str | None) -> Path | None:
    """
    What relative paths of images start from: `image_root`, or the folder of a local data set; `None` for one on the
    Hub.

    Raises:
        UserError: if `image_root` is neither a folder nor a file.
    """
    path = Path(name if image_root is None else image_root).absolute()
    if image_root is not None:
        if not path.exists():
            raise UserError(f"--image_root {image_root}: no such folder or zip file.")
        return path
    return (path.parent if path.is_file() else path) if path.exists() else None


def undecoded(features: Features) -> Features:
    """Features whose images and videos are not decoded: `{"path", "bytes"}` instead of pictures."""

    def without_decoding(feature: Any) -> Any:
        if isinstance(feature, dict):
            return {key: without_decoding(value) for key, value in feature.items()}
        if isinstance(feature, (List, LargeList)):
            return replace(feature, feature=without_decoding(feature.feature))
        return replace(feature, decode=False) if isinstance(feature, (Image, Video)) else feature

    return Features(without_decoding(features))


def _folder_files(folder: Path) -> tuple[str, dict[str, list[str]]]:
    """The format of the data files in a folder, and the files by split, as patterns; other files are ignored."""
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # a link to a folder above would repeat its rows
            folders.clear()
            continue
        seen.add(real)
        # Not what the rules of `datasets` pass over.
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        paths = [Path(parent, name) for name in files if Path(name).suffix in FILE_FORMATS and name[0] != "."]
        found += [path.relative_to(folder) for path in paths if path.is_file()]
    if not found:
        raise UserError(f"{folder} contains no {', '.join(FILE_FORMATS)} file. Give the name of one file.")
    # The rules of `datasets` for splits go through a folder many times: they get one without its 50,000 images.
    with TemporaryDirectory() as names:
        for file in found:
            (names / file).parent.mkdir(parents=True, exist_ok=True)
            (names / file).touch()
        files = DataFilesDict.from_patterns(get_data_patterns(names), base_path=names)
        files = {split: [Path(file).relative_to(names) for file in files[split]] for split in files}
    formats = {FILE_FORMATS[file.suffix] for found in files.values() for file in found}
    if len(formats) != 1:
        raise UserError(f"{folder} contains both JSON and Parquet files. Give the name of one file.")
    return formats.pop(), {split: [escape(str(folder / file)) for file in found] for split, found in files.items()}
