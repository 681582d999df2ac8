"""Conversations as tensors with a label mask: one at a time, in batches, as a stream."""

import itertools
import json
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from datasets import Image, IterableDataset
from transformers import ProcessorMixin
from transformers.video_utils import VideoMetadata, read_video_pyav

from pvm.data.forms import Conversation
from pvm.data.sources import Conversations, DataArguments, Mixture, from_record, read_streams
from pvm.errors import SetupError, UserError


IGNORE_INDEX = -100  # what the loss of transformers and torch leaves out
WATCH_AFTER = 500  # rows of a stream, before its share of bad ones is judged


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
        advice (`str`): what to do about a row that cannot be used, beside mending it.
        processor, max_length, train_on, prompt_only: see [`ConversationEncoder`].
    """

    def __init__(
        self, conversations: Conversations | Mixture, processor: ProcessorMixin, advice: str = "", **encoder_arguments
    ):
        self.conversations = conversations
        self.advice = advice
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
            raise UserError(f"{self.conversations.where(index)}: {error}{self.advice}") from error


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


class ConversationStream(torch.utils.data.IterableDataset):
    """
    The rows of [`load_streams`] as model inputs, again and again without end: readers (ranks and their workers) have
    different numbers of usable rows, and none must run out before the others. `--max_steps` ends the training.

    A row that cannot be used is skipped, and named in `skipped_rows-RANK-WORKER.jsonl`, a file for each process that
    reads. Where a data set has several files, `row` counts within what that process read.

    Args:
        streams (`Sequence[datasets.IterableDataset]`): the data sets.
        encoder (`ConversationEncoder`): what makes inputs of their rows.
        arguments (`DataArguments`): how they are mixed, and how many rows may be skipped.
        output_dir (`str` or `Path`): where the reports go.
        seed (`int`): of the order.
        rank, world_size (`int`): of this process.
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
    ):
        self.streams = streams
        self.encoder = encoder
        self.arguments = arguments
        self.output_dir = Path(output_dir)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """
        Raises:
            UserError: after `WATCH_AFTER` rows or all, if too many were bad.
        """
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        reader, readers = self.rank * workers + worker, self.world_size * workers
        report = self.output_dir / f"skipped_rows-{self.rank}-{worker}.jsonl"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.unlink(missing_ok=True)  # a resumed run reads all from the start again
        seen, skipped, refused = 0, 0, {}
        for epoch in itertools.count():
            for record in read_streams(self.streams, self.arguments, self.seed + epoch, reader, readers):
                seen += 1
                try:
                    example = self.encoder(from_record(record))
                except SetupError:
                    raise
                except UserError as error:
                    skipped += 1
                    refused = {"dataset": record["dataset"], "row": record["row"], "problem": str(error)}
                    if epoch == 0:
                        with open(report, "a", encoding="utf-8") as file:
                            file.write(json.dumps(refused, ensure_ascii=False) + "\n")
                else:
                    yield example
                if seen >= WATCH_AFTER:
                    self._watch(seen, skipped, refused)
            if skipped == seen:
                raise UserError(f"None of the {seen} rows of the stream can be used; {report} says why.")
            self._watch(seen, skipped, refused)

    def _watch(self, seen: int, skipped: int, last: dict[str, Any]) -> None:
        if skipped > self.arguments.max_skipped * seen:
            raise UserError(
                f"{skipped} of the first {seen} rows cannot be used, more than --max_skipped "
                f"{self.arguments.max_skipped:g}. {self.output_dir}/skipped_rows-*.jsonl name them; the last: "
                f"{last['dataset']}, row {last['row']}: {last['problem']}"
            )


def no_visuals(subject: str) -> str:
    """The sentence that refuses data without images to a method that needs them."""
    return (
        f"{subject} has an image or a video, and --method pvm learns from nothing else. Check the columns `images` "
        "and `videos`, or choose --method lora or full."
    )


def processor_state(processor: ProcessorMixin) -> str:
    """Everything that decides what a processor makes of a row: two with the same state give the same inputs."""
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    # What was asked for in the last call, before the tokenizer was saved or since; every call sets it anew.
    del tokenizer["padding"], tokenizer["truncation"]
    template = processor.chat_template or processor.tokenizer.chat_template
    return json.dumps([processor.to_dict(), processor.image_processor.to_dict(), tokenizer, template], default=str)
