"""Conversations as tensors with a label mask, and batches of them."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import ProcessorMixin

from pvm.data.forms import Conversation, message_text
from pvm.data.media import read_bytes, read_image, read_video
from pvm.data.sources import Conversations, Mixture
from pvm.errors import UserError


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
        check (`Callable`, *optional*): called with the conversation and its inputs, to raise what else is a problem.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        max_length: int | None = None,
        train_on: str = "all",
        prompt_only: bool = False,
        check: Callable[[Conversation, dict[str, torch.Tensor]], None] | None = None,
    ):
        self.processor = processor
        self.max_length = max_length
        self.train_on = train_on
        self.prompt_only = prompt_only
        self.check = check
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
            # Otherwise guessed from the shape, and wrongly for videos of 1 or 3 pixels.
            media["videos_kwargs"] = {"input_data_format": "channels_first"}
        refuse_special_tokens(conversation.messages, self.processor)
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
        if self.check is not None:
            self.check(conversation, example)
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
        labelled = [(*turn, index) for turn, index in zip(turns, answers) if index >= conversation.prompt_messages]
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        for start, end, index in labelled[-1:] if self.train_on == "last" else labelled:
            answer = message_text(conversation.messages[index])
            if _without_spaces(answer) not in _without_spaces(self.processor.tokenizer.decode(input_ids[start:end])):
                raise UserError(
                    f"the chat template drops part of message {index}, as those of Thinking models drop the reasoning "
                    "of all answers but the last. Use --train_on last, or end a row of its own with each answer."
                )
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


def refuse_special_tokens(messages: Sequence[dict[str, Any]], processor: ProcessorMixin) -> None:
    """
    Make sure that all special tokens of a conversation are the chat template's. In a text, also if two parts make one
    together, they would be parsed as turns, images or the end of an answer, and learned.

    Args:
        messages (`Sequence[dict]`): of a [`Conversation`].

    Raises:
        UserError: naming the token and, if one message contains it, the message.
    """
    tokens = [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
    special = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

    def special_tokens(messages: Sequence[dict[str, Any]]) -> list[str]:
        # Tokenizers look for special tokens first, and verbatim.
        return special.findall(processor.apply_chat_template(messages, tokenize=False))

    # The same messages with harmless texts.
    blank = [
        {
            **message,
            "content": [{**part, "text": "x"} if part["type"] == "text" else part for part in message["content"]],
        }
        for message in messages
    ]
    found, expected = special_tokens(messages), special_tokens(blank)
    if found != expected:
        token = next((token for token in found if found.count(token) > expected.count(token)), "a special token")
        index = next((index for index, message in enumerate(messages) if token in message_text(message)), None)
        raise UserError(
            f"the text of {'several messages together' if index is None else f'message {index}'} contains {token}, "
            "which the chat format reserves. Remove it, or write it differently."
        )


def content_digest(conversation: Conversation) -> str:
    """
    SHA-256 of the texts and media files of a row, wherever those are.

    Raises:
        UserError: if a file cannot be read.
    """
    digest = hashlib.sha256(json.dumps([conversation.messages, conversation.prompt_messages]).encode())
    files = [(image, "image") for image in conversation.images]
    for video in conversation.videos:
        files += [(video, "video")] if video["frames"] is None else [(frame, "image") for frame in video["frames"]]
    for file, kind in files:
        digest.update(read_bytes(file, kind))
    return digest.hexdigest()


def _without_spaces(text: str) -> str:
    """A text as the tokenizer composes it, but for white space, which chat templates may change."""
    return "".join(unicodedata.normalize("NFC", text).split())


class ConversationDataset(torch.utils.data.Dataset):
    """
    Conversations as model inputs, encoded on access.

    Args:
        conversations (`Conversations` or `Mixture`): the rows.
        advice (`str`): ends the message about a row that cannot be used.
        fingerprint (`str`, *optional*): what the rows contain; the same for the same rows somewhere else.
        processor, max_length, train_on, prompt_only: see [`ConversationEncoder`].
    """

    def __init__(
        self,
        conversations: Conversations | Mixture,
        processor: ProcessorMixin,
        advice: str = "",
        fingerprint: str | None = None,
        **encoder_arguments,
    ):
        self.conversations = conversations
        self.advice = advice
        self.fingerprint = fingerprint
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
