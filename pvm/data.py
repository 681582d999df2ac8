"""Conversations about images and videos: from files, folders or the Hub to tensors with a label mask."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
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
from datasets.distributed import split_dataset_by_node
from transformers import ProcessorMixin
from transformers.video_utils import VideoMetadata, read_video_pyav

from .errors import SetupError, UserError
from .formats import Conversation, check_columns, to_conversation


FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
IGNORE_INDEX = -100  # what the loss of transformers and torch leaves out
WATCH_AFTER = 500  # rows of a stream, before its share of bad ones is judged


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


# From a name to rows


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
        return to_conversation(self.features.decode_example(row), self.folder)

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

    def column(self, name: str) -> list:
        """The values of a column of the data set, in these rows."""
        return self.dataset.with_format(None).select(self.rows)[name][:]


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
    _check_columns(name, dataset.column_names)
    return Conversations(name, dataset, _folder(name))


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
        if path.is_file():
            source = {"path": FILE_FORMATS[path.suffix], "data_files": str(path)}
        elif path.is_dir():
            source = _folder_source(path)
        else:
            source = {"path": name, "name": config_name}
        dataset = load_dataset(**source, split=split, streaming=streaming)
    except UserError:
        raise
    except Exception as error:  # `datasets` raises whatever its readers raise
        reason = str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"Cannot load split `{split}` of the data set `{name}`: {reason}") from error
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        raise UserError(f"{name}: name one split of {', '.join(dataset)}.")
    return dataset


def _folder_source(path: Path) -> dict[str, Any]:
    """What `load_dataset` takes for a folder: its data files by split, without the images that lie beside them."""
    patterns = get_data_patterns(str(path))
    files = DataFilesDict.from_patterns(patterns, base_path=str(path), allowed_extensions=list(FILE_FORMATS))
    files = {split: [str(file) for file in found] for split, found in files.items() if found}
    formats = {FILE_FORMATS[Path(file).suffix] for found in files.values() for file in found}
    if len(formats) != 1:
        found = "both JSON and Parquet files" if formats else f"no {', '.join(FILE_FORMATS)} file"
        raise UserError(f"{path} holds {found}. Name one file.")
    return {"path": formats.pop(), "data_files": files}


# From a row to model inputs


class ConversationEncoder:
    """
    Makes model inputs of a conversation.

    Args:
        processor (`ProcessorMixin`): Qwen3-VL's processor.
        max_length (`int`, *optional*): longest conversation accepted, in tokens. Nothing is ever truncated.
        train_on (`str`): "all" or "last": which of the assistant's turns are labels.
        prompt_only (`bool`): leave out the last assistant turn, and end with the prompt for it: for generation.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        max_length: int | None = None,
        train_on: str = "all",
        prompt_only: bool = False,
    ):
        self.processor = processor
        self.max_length = max_length
        self.train_on = train_on
        self.prompt_only = prompt_only
        tokenizer = processor.tokenizer
        self.turn_start = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        self.turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def __call__(self, conversation: Conversation) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict`: `input_ids`, `labels`, `mm_token_type_ids` `[sequence]`; with images, `pixel_values`
            `[patches, pixels]` and `image_grid_thw` `[images, 3]`; with videos, `pixel_values_videos` and
            `video_grid_thw` likewise. `labels` is -100 outside the turns to learn.

        Raises:
            UserError: if the conversation cannot be used; `SetupError` if no video can be read.
        """
        messages = conversation.messages[:-1] if self.prompt_only else conversation.messages
        media: dict[str, Any] = {}
        if conversation.images:
            media["images"] = [read_image(image) for image in conversation.images]
        if conversation.videos:
            videos = [read_video(video, self.processor.video_processor) for video in conversation.videos]
            media["videos"], media["video_metadata"] = ([pair[k] for pair in videos] for k in range(2))
            media["do_sample_frames"] = False  # done in reading
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=self.prompt_only)
        try:
            inputs = self.processor(text=[text], **media, return_tensors="pt", return_mm_token_type_ids=True)
        except ValueError as error:  # e.g. an image that is 200 times as wide as high
            raise UserError(f"the processor refuses it: {error}") from error

        # Per-token inputs come with a batch dimension of 1; those of the images have none.
        example = {key: inputs[key][0] for key in ("input_ids", "mm_token_type_ids")}
        example |= {key: inputs[key] for key in VISUAL_INPUTS if key in inputs}
        length = len(example["input_ids"])
        if self.max_length is not None and length > self.max_length:
            visual = int((example["mm_token_type_ids"] > 0).sum())
            raise UserError(
                f"the conversation has {length} tokens ({visual} of them visual), and max_length is "
                f"{self.max_length}. Nothing is truncated: raise max_length, shrink the images, or drop the row."
            )
        if not self.prompt_only:
            example["labels"] = self._labels(example["input_ids"], conversation)
        return example

    def _labels(self, input_ids: torch.LongTensor, conversation: Conversation) -> torch.LongTensor:
        """The ids inside the assistant's turns to learn, `<|im_end|>` included, and -100 elsewhere."""
        turns = self._assistant_turns(input_ids.tolist())
        answers = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if len(turns) != len(answers) or any(end - start < 2 for start, end in turns):
            raise UserError(
                f"the chat template made {len(turns)} `<|im_start|>assistant` turns of {len(answers)} answers, or "
                "left out their text: this model's chat format is not Qwen3-VL's."
            )
        learned = [turn for turn, index in zip(turns, answers) if index >= conversation.given]
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        for start, end in learned[-1:] if self.train_on == "last" else learned:
            labels[start:end] = input_ids[start:end]
        return labels

    def _assistant_turns(self, ids: list[int]) -> list[tuple[int, int]]:
        """Where the assistant's turns start, after their header, and end, after their `<|im_end|>`."""
        turns, start = [], 0
        while start < len(ids):
            if ids[start : start + len(self.turn_start)] != self.turn_start:
                start += 1
                continue
            start += len(self.turn_start)
            end = ids.index(self.turn_end, start) + 1 if self.turn_end in ids[start:] else len(ids)
            turns.append((start, end))
            start = end
        return turns


VISUAL_INPUTS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


def read_image(file: dict[str, Any]) -> Any:
    """
    The RGB picture of a [`Conversation`]'s image.

    Raises:
        UserError: if there is no such file, or no picture in it.
    """
    try:
        return Image().decode_example(file).convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"the image {file['path']} does not exist.") from error
    except Exception as error:  # Pillow's readers raise whatever they stumble over in a broken file
        raise UserError(f"the image {file['path'] or ''} cannot be read: {error}") from error


def read_video(video: dict[str, Any], video_processor: Any) -> tuple[Any, VideoMetadata]:
    """
    The frames of a [`Conversation`]'s video that the model is to see, and when they are. A file is sampled as the
    video processor says; a list of images is taken as sampled at that rate already.

    Returns:
        Frames `[frames, height, width, 3]` or a list of pictures, and their metadata.

    Raises:
        UserError: if there is no such file, or no video in it.
        SetupError: if no video file can be read, without PyAV.
    """
    if video["frames"] is not None:
        frames = [read_image(frame) for frame in video["frames"]]
        if len({frame.size for frame in frames}) > 1:
            raise UserError("the frames of a video differ in size.")
        indices = list(range(len(frames)))
        return frames, VideoMetadata(len(frames), fps=video_processor.fps, frames_indices=indices)
    if video["bytes"] is None and not Path(video["path"]).is_file():
        raise UserError(f"the video {video['path']} does not exist.")
    source = video["path"] if video["bytes"] is None else BytesIO(video["bytes"])
    try:
        # transformers' own choice is torchcodec, which needs an installed FFmpeg; PyAV brings its own.
        return read_video_pyav(source, video_processor.sample_frames)
    except ImportError as error:
        raise SetupError("videos are read with PyAV, which is not installed: pip install av.") from error
    except Exception as error:  # FFmpeg's errors are of many kinds
        raise UserError(f"the video {video['path'] or ''} cannot be read: {error}") from error


class ConversationDataset(torch.utils.data.Dataset):
    """
    Conversations as model inputs, made when they are asked for.

    Args:
        conversations (`Conversations` or `Mixture`): the rows.
        processor, max_length, train_on, prompt_only: see [`ConversationEncoder`].
    """

    def __init__(self, conversations: Conversations | Mixture, processor: ProcessorMixin, **encoder_arguments):
        self.conversations = conversations
        self.encoder = ConversationEncoder(processor, **encoder_arguments)

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict`: see [`ConversationEncoder`].

        Raises:
            UserError: naming the row, if it cannot be used.
        """
        try:
            return self.encoder(self.conversations[index])
        except UserError as error:
            raise UserError(f"{self.conversations.where(index)}: {error}") from error


class ConversationCollator:
    """
    Pads examples of [`ConversationDataset`] to one length.

    Args:
        pad_token_id (`int`): what the padding of `input_ids` is.
        padding_side (`str`): "right" to train, "left" to generate.
    """

    def __init__(self, pad_token_id: int, padding_side: str = "right"):
        self.padding = {"input_ids": pad_token_id, "mm_token_type_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0}
        self.padding_side = padding_side

    def __call__(self, examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict`: `input_ids`, `attention_mask`, `mm_token_type_ids` and, to train, `labels` `[batch, sequence]`;
            `pixel_values`, `image_grid_thw`, `pixel_values_videos` and `video_grid_thw` of all examples in a row, if
            there are images or videos.
        """
        examples = [{**example, "attention_mask": torch.ones_like(example["input_ids"])} for example in examples]
        batch = {}
        for key, value in self.padding.items():
            if key in examples[0]:
                rows = [example[key] for example in examples]
                batch[key] = torch.nn.utils.rnn.pad_sequence(rows, True, value, padding_side=self.padding_side)
        for key in VISUAL_INPUTS:
            rows = [example[key] for example in examples if key in example]
            if rows:
                batch[key] = torch.cat(rows)
        return batch


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


def load_stream(arguments: DataArguments, seed: int, rank: int = 0, world_size: int = 1) -> IterableDataset:
    """
    The data sets of a command line as one stream of rows with the columns of `RECORD`, of which each rank reads its
    own share.
    """
    streams = []
    for label, name, config_name, split, count in _each(arguments):
        stream = _load(name, split, config_name, streaming=True)
        if stream.features is not None:
            stream = stream.decode(False).cast(Features(undecoded(stream.features)))
        first = next(iter(stream), None)
        if first is None:
            raise UserError(f"{name}, split {split}, has no rows.")
        _check_columns(name, list(first))
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
    stream = mix(streams, arguments.dataset_weights, arguments.stopping_strategy, seed)
    if arguments.shuffle_buffer_size > 1:
        stream = stream.shuffle(seed=seed, buffer_size=arguments.shuffle_buffer_size)
    return split_dataset_by_node(stream, rank, world_size)


def _to_record(row: dict[str, Any], index: int, name: str, folder: Path | None) -> dict[str, Any]:
    try:
        return {"dataset": name, "row": index, "problem": None, **asdict(to_conversation(row, folder))}
    except UserError as error:
        return {"dataset": name, "row": index, "problem": str(error), **asdict(Conversation([]))}


def _from_record(record: dict[str, Any]) -> Conversation:
    if record["problem"] is not None:
        raise UserError(record["problem"])
    for message in record["messages"]:
        for part in message["content"]:
            if part["type"] != "text":
                part.pop("text", None)
    return Conversation(record["messages"], record["images"], record["videos"], record["given"])


class ConversationStream(torch.utils.data.IterableDataset):
    """
    The rows of [`load_stream`] as model inputs, again and again without end: ranks have different numbers of usable
    rows, and none must run out before the others. `--max_steps` ends the training.

    A row that cannot be used is skipped, and named in `skipped_rows-RANK-WORKER.jsonl`, a file for each process that
    reads. Where a data set has several files, `row` counts within what that process read.

    Args:
        stream (`datasets.IterableDataset`): the rows of this rank.
        encoder (`ConversationEncoder`): what makes inputs of them.
        arguments (`DataArguments`): `max_skipped` is looked at.
        output_dir (`str` or `Path`): where the reports go.
        rank (`int`): of this process.
        needs_visuals (`bool`): stop if there turns out to be no image and no video.
    """

    def __init__(
        self,
        stream: IterableDataset,
        encoder: ConversationEncoder,
        arguments: DataArguments,
        output_dir: str | Path,
        rank: int = 0,
        needs_visuals: bool = False,
    ):
        self.stream = stream
        self.encoder = encoder
        self.arguments = arguments
        self.output_dir = Path(output_dir)
        self.rank = rank
        self.needs_visuals = needs_visuals

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """
        Raises:
            UserError: after `WATCH_AFTER` rows or all, if too many were bad, or none has an image that needs one.
        """
        worker = torch.utils.data.get_worker_info()
        report = self.output_dir / f"skipped_rows-{self.rank}-{0 if worker is None else worker.id}.jsonl"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.unlink(missing_ok=True)  # a resumed run reads all from the start again
        seen, skipped, with_visuals, refused = 0, 0, 0, {}
        for epoch in itertools.count():
            self.stream.set_epoch(epoch)
            for record in self.stream:
                seen += 1
                try:
                    example = self.encoder(_from_record(record))
                except SetupError:
                    raise
                except UserError as error:
                    skipped += 1
                    refused = {"dataset": record["dataset"], "row": record["row"], "problem": str(error)}
                    if epoch == 0:
                        with open(report, "a", encoding="utf-8") as file:
                            file.write(json.dumps(refused, ensure_ascii=False) + "\n")
                    example = None
                with_visuals += example is not None and bool(example["mm_token_type_ids"].any())
                if seen >= WATCH_AFTER:
                    self._watch(seen, skipped, with_visuals, refused)
                if example is not None:
                    yield example
            if seen == 0:  # there are more readers than files
                return
            self._watch(seen, skipped, with_visuals, refused)

    def _watch(self, seen: int, skipped: int, with_visuals: int, last: dict[str, Any]) -> None:
        if skipped > self.arguments.max_skipped * seen:
            raise UserError(
                f"{skipped} of the first {seen} rows cannot be used, more than --max_skipped "
                f"{self.arguments.max_skipped:g}. {self.output_dir}/skipped_rows-*.jsonl name them; the last: "
                f"{last['dataset']}, row {last['row']}: {last['problem']}"
            )
        if self.needs_visuals and not with_visuals:
            raise UserError(no_visuals(f"None of the first {seen} rows of {' '.join(self.arguments.dataset_name)}"))


def no_visuals(subject: str) -> str:
    """The sentence that refuses data without images to a method that needs them."""
    return (
        f"{subject} has an image or a video, and --method pvm learns from nothing else. Check the columns `images` "
        "and `videos`, or choose --method lora or full."
    )
