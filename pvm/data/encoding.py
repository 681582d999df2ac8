"""Conversations as tensors with a label mask, and batches of them."""

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from datasets import Image
from transformers import ProcessorMixin
from transformers.video_utils import VideoMetadata, read_video_pyav

from pvm.data.forms import Conversation
from pvm.data.sources import Conversations, Mixture
from pvm.errors import SetupError, UserError


IGNORE_INDEX = -100  # labels that the losses of torch and transformers ignore
VISUAL_INPUTS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


class ConversationEncoder:
    """
    Turns a [`Conversation`] into model inputs.

    Args:
        processor (`ProcessorMixin`): Qwen3-VL's processor.
        max_length (`int`, *optional*): maximum tokens of a conversation. Longer ones are refused, never truncated.
        train_on (`str`): which of the assistant's turns are labels, "all" or "last".
        prompt_only (`bool`): replace the last assistant turn by the generation prompt; without labels.
        max_image_tokens (`int`, *optional*): maximum tokens of an image. Larger ones are refused, never shrunk.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        max_length: int | None = None,
        train_on: str = "all",
        prompt_only: bool = False,
        max_image_tokens: int | None = None,
    ):
        self.processor = processor
        self.max_image_tokens = max_image_tokens
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
            `video_grid_thw` likewise. `labels` is -100 outside the turns to train on.

        Raises:
            UserError: if the conversation cannot be used.
            SetupError: if it has a video and PyAV is not installed.
        """
        messages = conversation.messages[:-1] if self.prompt_only else conversation.messages
        media: dict[str, Any] = {}
        if conversation.images:
            media["images"] = [read_image(image) for image in conversation.images]
        if conversation.videos:
            videos = [read_video(video, self.processor.video_processor) for video in conversation.videos]
            media["videos"], media["video_metadata"] = map(list, zip(*videos))
            media["do_sample_frames"] = False  # `read_video` has sampled them
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=self.prompt_only)
        try:
            inputs = self.processor(text=[text], **media, return_tensors="pt", return_mm_token_type_ids=True)
        except ValueError as error:  # for instance an extreme aspect ratio
            raise UserError(f"the processor rejects the conversation: {error}") from error

        # Inputs per token have a batch dimension of 1; those of images and videos have none.
        example = {key: inputs[key][0] for key in ("input_ids", "mm_token_type_ids")}
        example |= {key: inputs[key] for key in VISUAL_INPUTS if key in inputs}
        length = len(example["input_ids"])
        if self.max_length is not None and length > self.max_length:
            visual = int((example["mm_token_type_ids"] > 0).sum())
            raise UserError(
                f"the conversation has {length} tokens ({visual} of them visual), more than max_length "
                f"{self.max_length}. Nothing is truncated: raise max_length, shrink the images, or remove the row."
            )
        if self.max_image_tokens is not None and "image_grid_thw" in example:
            largest = int(example["image_grid_thw"].prod(dim=1).max()) // self.processor.image_processor.merge_size**2
            if largest > self.max_image_tokens:
                raise UserError(
                    f"an image has {largest} tokens, more than the {self.max_image_tokens} that can be sampled from: "
                    "make it smaller, or remove the row."
                )
        if not self.prompt_only:
            example["labels"] = self._labels(example["input_ids"], conversation)
        return example

    def _labels(self, input_ids: torch.LongTensor, conversation: Conversation) -> torch.LongTensor:
        """The ids of the assistant's turns to train on, including `<|im_end|>`, and -100 elsewhere."""
        turns = self._assistant_turns(input_ids.tolist())
        answers = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if len(turns) != len(answers) or any(end - start < 2 for start, end in turns):
            raise UserError(
                f"the chat template made {len(turns)} `<|im_start|>assistant` turns of {len(answers)} answers, or "
                "dropped their text. Only the chat format of Qwen3-VL is supported."
            )
        labelled = [turn for turn, index in zip(turns, answers) if index >= conversation.prompt_messages]
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        for start, end in labelled[-1:] if self.train_on == "last" else labelled:
            labels[start:end] = input_ids[start:end]
        return labels

    def _assistant_turns(self, ids: list[int]) -> list[tuple[int, int]]:
        """Start (after the header) and end (after `<|im_end|>`) of the assistant's turns."""
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


def read_image(file: dict[str, Any]) -> Any:
    """
    Decode an image of a [`Conversation`] as an RGB picture.

    Raises:
        UserError: if the file does not exist or cannot be decoded.
    """
    try:
        return Image().decode_example(file).convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"the image {file['path']} does not exist.") from error
    except Exception as error:  # Pillow raises exceptions of many types for broken files
        raise UserError(f"the image {file['path'] or ''} cannot be read: {error}") from error


def read_video(video: dict[str, Any], video_processor: Any) -> tuple[Any, VideoMetadata]:
    """
    Decode a video of a [`Conversation`]. Files are sampled as the video processor specifies; a list of images is taken
    to be sampled at that rate already.

    Returns:
        Frames `[frames, height, width, 3]` or a list of pictures, and their metadata.

    Raises:
        UserError: if the file does not exist or cannot be decoded.
        SetupError: if PyAV is not installed.
    """
    if video["frames"] is not None:
        frames = [read_image(frame) for frame in video["frames"]]
        if len({frame.size for frame in frames}) > 1:
            raise UserError("the images of a video differ in size.")
        indices = list(range(len(frames)))
        return frames, VideoMetadata(len(frames), fps=video_processor.fps, frames_indices=indices)
    if video["bytes"] is None and not Path(video["path"]).is_file():
        raise UserError(f"the video {video['path']} does not exist.")
    source = video["path"] if video["bytes"] is None else BytesIO(video["bytes"])
    try:
        # transformers would use torchcodec, which needs a system-wide FFmpeg. PyAV includes its own.
        return read_video_pyav(source, video_processor.sample_frames)
    except ImportError as error:
        raise SetupError("reading videos needs PyAV: pip install av.") from error
    except Exception as error:  # so does PyAV
        raise UserError(f"the video {video['path'] or ''} cannot be read: {error}") from error


class ConversationDataset(torch.utils.data.Dataset):
    """
    Conversations as model inputs, encoded on access.

    Args:
        conversations (`Conversations` or `Mixture`): the rows.
        advice (`str`): ends the message about a row that cannot be used.
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
        pad_token_id (`int`): pads `input_ids`.
        padding_side (`str`): "right" for training, "left" for generation.
    """

    def __init__(self, pad_token_id: int, padding_side: str = "right"):
        self.padding = {"input_ids": pad_token_id, "mm_token_type_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0}
        self.padding_side = padding_side

    def __call__(self, examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict`: `input_ids`, `attention_mask`, `mm_token_type_ids` and, for training, `labels` `[batch, sequence]`;
            with images or videos, their `pixel_values`, `image_grid_thw`, `pixel_values_videos` and `video_grid_thw`,
            concatenated over the examples.
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


def processor_state(processor: ProcessorMixin) -> str:
    """All that a processor's output depends on: processors with equal states produce equal inputs."""
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    # Left over from the last call, and set again by every call.
    del tokenizer["padding"], tokenizer["truncation"]
    template = processor.chat_template or processor.tokenizer.chat_template
    return json.dumps([processor.to_dict(), processor.image_processor.to_dict(), tokenizer, template], default=str)
