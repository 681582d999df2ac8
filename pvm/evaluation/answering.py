"""Greedy answers to all questions, a batch at a time; a run that was interrupted goes on where it stopped."""

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
from pvm.evaluation.ablations import SPLIT, KnockOut, generate_split
from pvm.evaluation.questions import Prompts


@dataclass
class Answer:
    """
    prediction (`str`): the text.
    length (`int`): its tokens, the one that ends it not counted.
    cut (`bool`): whether it had not ended at its limit.
    """

    prediction: str
    length: int
    cut: bool


def make_batches(lengths: Sequence[int], kinds: Sequence[Any], batch_size: int) -> list[list[int]]:
    """Indices of rows of equal kind and like lengths. The longest come first: memory fails at once or never."""
    batches = []
    for kind in sorted(set(kinds), reverse=True):
        rows = [index for index in range(len(lengths)) if kinds[index] == kind]
        rows.sort(key=lambda index: lengths[index], reverse=True)
        batches += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return batches


def read_journal(file: Path) -> dict[int, Answer]:
    """
    The answers by row that an interrupted run has left. A line that it was writing is cut off, so that the next one
    begins anew.
    """
    answers, whole = {}, 0
    for line in file.read_bytes().splitlines(keepends=True) if file.is_file() else []:
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
            row = entry.pop("row")
            answers[row] = Answer(**entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            break
        whole += len(line)
    if file.is_file():
        os.truncate(file, whole)
    return answers


@torch.inference_mode()
def answer(
    checkpoint: Checkpoint,
    prompts: Prompts,
    limits: Sequence[int],
    batch_size: int,
    name: str,
    knock_out: KnockOut | None = None,
    others: Prompts | None = None,
    journal: Path | None = None,
) -> list[Answer]:
    """
    Greedy answers of a model to all prompts.

    Args:
        knock_out (`KnockOut`, *optional*): what is taken from the model.
        others (`Prompts`, *optional*): the same prompts with images of other rows, where it needs them.
        journal (`Path`, *optional*): a file to which each batch is added once it is answered. Batches that are in it
            are not answered again.
    """
    model, tokenizer = checkpoint.model, checkpoint.processor.tokenizer
    knock_out = knock_out or KnockOut()
    collator = ConversationCollator(tokenizer.pad_token_id, padding_side="left")
    ends = torch.tensor(model.generation_config.eos_token_id)
    # Prompts in two parts are parted at the same place. Those without an image lack nothing.
    parted = [None if knock_out.kind not in SPLIT else distance for distance in prompts.distances]
    kinds = [(limit, distance or 0) for limit, distance in zip(limits, parted)]

    def inputs(made: Prompts, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return {key: value.to(model.device) for key, value in collator([made[row] for row in rows]).items()}

    answers = {} if journal is None else read_journal(journal)
    batches = make_batches(prompts.lengths, kinds, batch_size)
    left = [rows for rows in batches if not all(row in answers for row in rows)]
    with tqdm(total=len(limits), initial=len(limits) - sum(map(len, left)), desc=name, unit="row") as bar:
        for rows in left:
            batch, (limit, distance) = inputs(prompts, rows), kinds[rows[0]]
            if distance:
                other = None if others is None else inputs(others, rows)
                generated = generate_split(
                    checkpoint.plain_model, batch, other, distance, knock_out, limit, ends
                ).cpu()
            else:
                has_switch = bool(checkpoint.description.gates) and knock_out.use_pvm is not True
                switch = {"use_pvm": knock_out.use_pvm} if has_switch else {}  # which the stock model does not know
                generated = model.generate(**batch, max_new_tokens=limit, **switch)
                generated = generated[:, batch["input_ids"].shape[1] :].cpu()
            ended = torch.isin(generated, ends)
            lengths = (ended.cumsum(dim=1) == 0).sum(dim=1).tolist()
            texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
            for row, text, length, is_cut in zip(rows, texts, lengths, (~ended.any(dim=1)).tolist()):
                answers[row] = Answer(text, length, is_cut)
            if journal is not None:
                with open(journal, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps({"row": row, **asdict(answers[row])}) + "\n" for row in rows)
            bar.update(len(rows))
    return [answers[row] for row in range(len(limits))]
