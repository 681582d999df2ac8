"""Conversations about images: from a file, a folder or the Hub to tensors with a label mask."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, Image, List, load_dataset
from transformers import ProcessorMixin

from .errors import UserError


FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
IGNORE_INDEX = -100  # what the loss of transformers and torch leaves out


def load_conversations(name: str, split: str, config_name: str | None = None) -> Dataset:
    """
    Load a data set with the columns `images` and `messages`.

    Args:
        name (`str`): a .json, .jsonl or .parquet file, a folder of those, or a data set on the Hub.
        split (`str`): e.g. "train", "test", "train[:1000]". A single file has one split, "train".
        config_name (`str`, *optional*): configuration of a data set on the Hub.

    Returns:
        `datasets.Dataset`: its images decode to PIL images; paths in a local file are taken from where the file lies.

    Raises:
        UserError: if there is no such data set, split or column.
    """
    path = Path(name)
    if path.suffix in FILE_FORMATS and not path.is_file():
        raise UserError(f"{name}: no such file.")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{name} is empty.")
    try:
        if path.is_file():
            if path.suffix not in FILE_FORMATS:
                raise UserError(f"{name}: a data file must end in one of {', '.join(FILE_FORMATS)}.")
            dataset = load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split=split)
        else:
            dataset = load_dataset(name, config_name, split=split)
    except UserError:
        raise
    except Exception as error:  # `datasets` raises whatever its readers raise
        reason = str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"Cannot load split `{split}` of the data set `{name}`: {reason}") from error
    if isinstance(dataset, DatasetDict):
        raise UserError(f"{name}: name one split of {', '.join(dataset)}.")

    missing = {"images", "messages"} - set(dataset.column_names)
    if missing:
        raise UserError(
            f"{name} has the columns {', '.join(dataset.column_names)}, but no `{sorted(missing)[0]}`. A row is "
            '{"images": [...], "messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}.'
        )
    if dataset.features["images"] == List(Image()):
        return dataset
    if not path.exists():
        raise UserError(f"{name}: the column `images` must hold lists of images, not {dataset.features['images']}.")
    # In a local file images are paths, relative to where the file lies.
    folder = path.parent if path.is_file() else path
    dataset = dataset.map(lambda row: {"images": [str(folder / image) for image in row["images"] or []]})
    return dataset.cast_column("images", List(Image()))


class ConversationDataset(torch.utils.data.Dataset):
    """
    Rows of [`load_conversations`] as model inputs, made when they are asked for.

    Args:
        dataset (`datasets.Dataset`): the conversations.
        processor (`ProcessorMixin`): Qwen3-VL's processor.
        name (`str`): how error messages call the data set.
        max_length (`int`, *optional*): longest conversation accepted, in tokens. Nothing is ever truncated.
        prompt_only (`bool`): leave out the last assistant turn, and end with the prompt for it: for generation.
    """

    def __init__(
        self,
        dataset: Dataset,
        processor: ProcessorMixin,
        name: str,
        max_length: int | None = None,
        prompt_only: bool = False,
    ):
        self.dataset = dataset
        self.processor = processor
        self.name = name
        self.max_length = max_length
        self.prompt_only = prompt_only
        tokenizer = processor.tokenizer
        self.turn_start = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        self.turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict`: `input_ids`, `labels`, `mm_token_type_ids` `[sequence]`, and, with images, `pixel_values`
            `[patches, pixels]` and `image_grid_thw` `[images, 3]`. `labels` is -100 outside the assistant's turns.

        Raises:
            UserError: naming the row, if it cannot be used.
        """
        try:
            row = self.dataset[index]
            messages, images = conversation(row)
            if self.prompt_only:
                messages = messages[:-1]
            text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=self.prompt_only)
            inputs = self.processor(
                text=[text], images=images or None, return_tensors="pt", return_mm_token_type_ids=True
            )
        except (ValueError, OSError) as error:  # ours, the processor's, and those of missing or broken images
            raise UserError(f"{self.name}, row {index}: {error}") from error

        # Per-token inputs come with a batch dimension of 1; those of the images have none.
        example = {key: inputs[key][0] for key in ("input_ids", "mm_token_type_ids")}
        example |= {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
        length = len(example["input_ids"])
        if self.max_length is not None and length > self.max_length:
            raise UserError(
                f"{self.name}, row {index}: the conversation has {length} tokens, and max_length is "
                f"{self.max_length}. Nothing is truncated: raise max_length, shrink the images, or drop the row."
            )
        if not self.prompt_only:
            example["labels"] = self._labels(example["input_ids"])
            if (example["labels"] == IGNORE_INDEX).all():
                raise UserError(
                    f"{self.name}, row {index}: there is nothing to learn: the chat template produced no "
                    "`<|im_start|>assistant` turn with text in it."
                )
        return example

    def _labels(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """The ids inside assistant turns, `<|im_end|>` included, and -100 elsewhere."""
        ids, labels = input_ids.tolist(), torch.full_like(input_ids, IGNORE_INDEX)
        start = 0
        while start < len(ids):
            if ids[start : start + len(self.turn_start)] != self.turn_start:
                start += 1
                continue
            start += len(self.turn_start)
            end = ids.index(self.turn_end, start) + 1 if self.turn_end in ids[start:] else len(ids)
            labels[start:end] = input_ids[start:end]
            start = end
        return labels


def conversation(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list]:
    """
    The messages and images of a row, in the form that chat templates take.

    A `content` is a string or a list of parts, `{"type": "image"}` and `{"type": "text", "text": ...}`. Images that no
    part stands for go in front of the first user message (trl's convention for plain strings).

    Raises:
        UserError: for roles, contents or image counts that do not fit together.
    """
    messages, images = [], row["images"] or []
    for turn, message in enumerate(row["messages"]):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise UserError(f"message {turn} has the role {role!r}; use system, user or assistant.")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not content:
            raise UserError(f"message {turn} ({role}) is empty.")
        parts = []
        for part in content:
            if part.get("type") not in ("image", "text"):
                raise UserError(f"message {turn} has a part of type {part.get('type')!r}; use image or text.")
            parts.append({"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]})
        if role == "assistant" and not any(part.get("text") for part in parts):
            raise UserError(f"message {turn}, the assistant's, has no text.")
        messages.append({"role": role, "content": parts})
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError("the last message must be the assistant's: it is the answer to learn, or to compare with.")

    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placeholders == 0 and images:
        first_user = next((message for message in messages if message["role"] == "user"), None)
        if first_user is None:
            raise UserError("there are images, but no user message to show them in.")
        first_user["content"] = [{"type": "image"}] * len(images) + first_user["content"]
    elif placeholders != len(images):
        raise UserError(f"{len(images)} images, but {placeholders} image placeholders in the messages.")
    return messages, [image.convert("RGB") for image in images]


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
            `pixel_values` and `image_grid_thw` of all examples in a row, if there are images.
        """
        examples = [{**example, "attention_mask": torch.ones_like(example["input_ids"])} for example in examples]
        batch = {}
        for key, value in self.padding.items():
            if key in examples[0]:
                rows = [example[key] for example in examples]
                batch[key] = torch.nn.utils.rnn.pad_sequence(rows, True, value, padding_side=self.padding_side)
        for key in ("pixel_values", "image_grid_thw"):
            rows = [example[key] for example in examples if key in example]
            if rows:
                batch[key] = torch.cat(rows)
        return batch
