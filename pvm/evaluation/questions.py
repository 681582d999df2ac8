"""Rows of a data set as questions: the prompt, the reference answer, and the distance between image and answer."""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from pvm.data.encoding import ConversationDataset
from pvm.data.forms import message_text
from pvm.data.sources import Conversations
from pvm.errors import UserError
from pvm.evaluation.matching import check_reference


ANSWER_MARGIN = 8  # tokens by which an answer may be longer than its reference, at least
QUESTION_TAIL = 200  # characters of the question that are kept with its answers
KEPT_BYTES = 2**30  # of encoded prompts kept in memory; others are encoded again for each model


@dataclass
class Question:
    """
    A row of the data set.

    row (`int`): index in the split.
    group (`str`): its value in the `group_by` column, or "all".
    question (`str`): the end of the last user turn.
    reference (`str`): the last assistant turn.
    reference_length (`int`): its tokens.
    depths (`list[int]`): token offsets, in the reference, of its scored pieces.
    distance (`int` or `None`): tokens between the last visual token and the answer; `None` without an image.
    """

    row: int
    group: str
    question: str
    reference: str
    reference_length: int
    depths: list[int]
    distance: int | None = None


class Prompts:
    """
    The rows of a data set as inputs to generate from. Models with the same processor share them.

    Args:
        conversations (`Conversations`): the rows.
        processor (`ProcessorMixin`): of the model.
    """

    def __init__(self, conversations: Conversations, processor: ProcessorMixin):
        self.dataset = ConversationDataset(conversations, processor, prompt_only=True)
        self.lengths: list[int] = []
        self.distances: list[int | None] = []
        self.kept: list[dict[str, torch.Tensor] | None] = []
        kept_bytes, digest = 0, hashlib.sha256()
        for index in tqdm(range(len(self.dataset)), desc="preparing", unit="row"):
            example = self.dataset[index]
            self.lengths.append(len(example["input_ids"]))
            self.distances.append(image_distance(example["mm_token_type_ids"]))
            kept_bytes += sum(value.nbytes for value in example.values())
            for value in example.values():
                digest.update(value.contiguous().numpy().tobytes())
            self.kept.append(example if kept_bytes <= KEPT_BYTES else None)
        self.sha256 = digest.hexdigest()  # of all inputs

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.kept[index] or self.dataset[index]


def image_distance(mm_token_type_ids: torch.Tensor) -> int | None:
    """Tokens after the last visual token of a prompt (`[sequence]`, 0 is text); `None` without one."""
    visual = mm_token_type_ids.nonzero()
    return len(mm_token_type_ids) - 1 - int(visual[-1]) if len(visual) else None


def piece_depths(text: str, pattern: str | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The number of tokens before each match of `pattern` in `text`; no matches without a pattern."""
    if pattern is None:
        return []
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ends = [end for _, end in offsets]
    return [bisect_right(ends, match.start()) for match in re.finditer(pattern, text)]


def read_questions(
    conversations: Conversations, group_by: str | None, pattern: str | None, tokenizer: PreTrainedTokenizerBase
) -> list[Question]:
    """The questions of a data set, without their distances, which need [`Prompts`]."""
    groups = ["all"] * len(conversations) if group_by is None else map(str, conversations.column(group_by))
    questions = []
    for row, group, conversation in zip(conversations.rows, groups, conversations):
        users = [message for message in conversation.messages if message["role"] == "user"]
        question = message_text(users[-1]) if users else ""
        reference = message_text(conversation.messages[-1])
        length = len(tokenizer(reference, add_special_tokens=False)["input_ids"])
        depths = piece_depths(reference, pattern, tokenizer)
        questions.append(Question(row, group, question[-QUESTION_TAIL:], reference, length, depths))
    return questions


def check_references(questions: Sequence[Question], match: str, dataset_name: str) -> None:
    """
    Raises:
        UserError: naming the row, if `match` cannot be applied to its reference.
    """
    for question in questions:
        try:
            check_reference(match, question.reference)
        except UserError as error:
            raise UserError(f"{dataset_name}, row {question.row}: {error}") from error


def answer_limit(reference: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """
    The most tokens of an answer that is compared with `reference`. A power of two, so that there are few limits, and
    rows with the same limit can share a batch.
    """
    tokens = len(tokenizer(reference, add_special_tokens=False)["input_ids"]) + 1  # with <|im_end|>
    return 2 ** (tokens + ANSWER_MARGIN - 1).bit_length()
