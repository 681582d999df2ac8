"""Greedy answers to all questions, batch by batch."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pvm.checkpoints.loading import Checkpoint
from pvm.data.encoding import ConversationCollator
from pvm.evaluation.ablations import IN_TWO_PARTS, INTACT, Ablation, generate_in_two_parts
from pvm.evaluation.questions import Prompts


@dataclass
class Answer:
    """
    prediction (`str`): the text.
    length (`int`): its tokens, without the end token.
    cut (`bool`): whether it reached its length limit before its end.
    """

    prediction: str
    length: int
    cut: bool


def make_batches(lengths: Sequence[int], kinds: Sequence[Any], batch_size: int) -> list[list[int]]:
    """Indices of rows of equal kind and similar length. The longest come first: memory runs out at once or never."""
    batches = []
    for kind in sorted(set(kinds), reverse=True):
        rows = [index for index in range(len(lengths)) if kinds[index] == kind]
        rows.sort(key=lambda index: lengths[index], reverse=True)
        batches += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return batches


def read_journal(file: Path) -> dict[int, Answer]:
    """The answers by row in the journal of an interrupted run. An incomplete last line is removed from the file."""
    answers, complete = {}, 0
    for line in file.read_bytes().splitlines(keepends=True) if file.is_file() else []:
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
            row = entry.pop("row")
            answers[row] = Answer(**entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            break
        complete += len(line)
    if file.is_file():
        os.truncate(file, complete)
    return answers


@torch.inference_mode()
def answer(
    checkpoint: Checkpoint,
    prompts: Prompts,
    limits: Sequence[int],
    batch_size: int,
    label: str,
    ablation: Ablation = INTACT,
    others: Prompts | None = None,
    journal: Path | None = None,
) -> list[Answer]:
    """
    Greedy answers of a model to all prompts.

    Args:
        limits (`Sequence[int]`): most tokens of each answer.
        label (`str`): of the progress bar.
        ablation (`Ablation`): what is removed from the model.
        others (`Prompts`, *optional*): the same prompts with images of other rows, for `another_memory`.
        journal (`Path`, *optional*): the file to which each answered batch is appended; answers in it are reused.
    """
    model, tokenizer = checkpoint.model, checkpoint.processor.tokenizer
    collator = ConversationCollator(tokenizer.pad_token_id, padding_side="left")
    ends = torch.tensor(model.generation_config.eos_token_id)
    # All prompts of a batch are split at the same place. A prompt without an image is not split: nothing changes.
    splits = [distance or 0 if ablation.kind in IN_TWO_PARTS else 0 for distance in prompts.distances]
    kinds = list(zip(limits, splits))

    def inputs(prompts: Prompts, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return {key: value.to(model.device) for key, value in collator([prompts[row] for row in rows]).items()}

    answers = {} if journal is None else read_journal(journal)
    batches = make_batches(prompts.lengths, kinds, batch_size)
    left = [rows for rows in batches if not all(row in answers for row in rows)]
    with tqdm(total=len(limits), initial=len(limits) - sum(map(len, left)), desc=label, unit="row") as bar:
        for rows in left:
            batch, (limit, distance) = inputs(prompts, rows), kinds[rows[0]]
            if distance:
                other = None if others is None else inputs(others, rows)
                generated = generate_in_two_parts(
                    checkpoint.plain_model, batch, other, distance, ablation, limit, ends
                ).cpu()
            else:
                # Only a model with branches accepts `use_pvm`.
                has_switch = bool(checkpoint.description.gates) and ablation.use_pvm is not True
                use_pvm = {"use_pvm": ablation.use_pvm} if has_switch else {}
                generated = model.generate(**batch, max_new_tokens=limit, **use_pvm)
                generated = generated[:, batch["input_ids"].shape[1] :].cpu()
            ended = torch.isin(generated, ends)
            lengths = (ended.cumsum(dim=1) == 0).sum(dim=1).tolist()
            texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
            for row, text, length, cut in zip(rows, texts, lengths, (~ended.any(dim=1)).tolist()):
                answers[row] = Answer(text, length, cut)
            if journal is not None:
                with open(journal, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps({"row": row, **asdict(answers[row])}) + "\n" for row in rows)
            bar.update(len(rows))
    return [answers[row] for row in range(len(limits))]
