"""Rows as trl's trainer reads them: a prompt, its images and the reference answer; and what they must be like."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.configuration_utils import PreTrainedConfig

from pvm.data.encoding import read_image
from pvm.data.forms import Conversation, message_text
from pvm.data.sources import Mixture
from pvm.errors import UserError
from pvm.evaluation import matching
from pvm.evaluation.matching import check_reference


CODE = sorted(Path(matching.__file__).parent.glob("*.py"))


def longest_prompt(config: PreTrainedConfig, max_length: int | None, completion: int, window: int | None) -> int:
    """
    The most tokens of a prompt that leave room for a completion.

    Args:
        config (`PreTrainedConfig`): of the model.
        max_length (`int`, *optional*): the user's own limit.
        completion (`int`): the most tokens of a completion.
        window (`int`, *optional*): the context of vLLM, if it is not the model's.

    Raises:
        UserError: if there is no room for a prompt.
    """
    window = min(config.text_config.max_position_embeddings, window or 2**62)
    if completion >= window:
        raise UserError(
            f"--max_completion_length {completion} leaves no room for a prompt in a context of {window} tokens."
        )
    return min(window - completion, max_length or 2**62)


@dataclass
class PromptCheck:
    """
    The check of a row that [`ConversationEncoder`] does not do itself.

    match (`str`): how answers are compared.
    image_tokens (`int` or `None`): the most tokens of an image.
    merge_size (`int`): of the image processor.
    code (`list[str]`): of the comparison, because results of checks are cached.
    """

    match: str
    image_tokens: int | None
    merge_size: int
    code: list[str] = field(default_factory=lambda: [file.read_text("utf-8") for file in CODE], repr=False)

    def __call__(self, conversation: Conversation, example: dict[str, torch.Tensor]) -> None:
        """
        Raises:
            UserError: for a video, which trl does not read; an answer that completions cannot be compared with; an
                image that is too large.
        """
        if conversation.videos:
            raise UserError("it has a video, and GRPO reads images only.")
        check_reference(self.match, message_text(conversation.messages[-1]))
        if self.image_tokens is not None and "image_grid_thw" in example:
            largest = int(example["image_grid_thw"].prod(dim=1).max()) // self.merge_size**2
            if largest > self.image_tokens:
                raise UserError(
                    f"an image has {largest} tokens, and trl lets vLLM read at most {self.image_tokens}: make it "
                    "smaller, or sample without --use_vllm."
                )


def as_prompts(conversations: Mixture) -> Dataset:
    """
    A data set with the columns `prompt` (all messages but the last), `images` (RGB pictures) and `answer` (the text of
    the last message). Images are decoded when a row is read.
    """

    def read(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        rows: dict[str, list[Any]] = {"prompt": [], "images": [], "answer": []}
        for index in batch["index"]:
            conversation = conversations[index]
            rows["prompt"].append(conversation.messages[:-1])
            rows["answer"].append(message_text(conversation.messages[-1]))
            try:
                rows["images"].append([read_image(image) for image in conversation.images])
            except UserError as error:
                raise UserError(f"{conversations.where(index)}: {error}") from error
        return rows

    return Dataset.from_dict({"index": range(len(conversations))}).with_transform(read)
