"""Greedy answers to all questions, batch by batch."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from tqdm import tqdm
from transformers import Cache

from cache_qwen3vl_pvm import get_visual_memory
from pvm.checkpoints.loading import Checkpoint
from pvm.data.encoding import ConversationCollator
from pvm.errors import UserError
from pvm.evaluation.ablations import IN_TWO_PARTS, INTACT, Ablation, generate_in_two_parts
from pvm.evaluation.questions import Prompts
from variants_qwen3vl_pvm import BLOCKS


if TYPE_CHECKING:  # an extra
    from pvm.vllm.engine import Engine


Entry = TypeVar("Entry")


@dataclass
class Answer:
    """
    prediction (`str`): the text.
    length (`int`): its tokens, without the end token.
    cut (`bool`): whether it reached its length limit before its end.
    cache_bytes (`int`, *optional*): of the KV cache and the visual memory in the end; unknown for prompts that are
        processed in two parts.
    """

    prediction: str
    length: int
    cut: bool
    cache_bytes: int | None = None


def make_batches(lengths: Sequence[int], kinds: Sequence[Any], batch_size: int) -> list[list[int]]:
    """Indices of rows of equal kind and similar length. The longest come first: memory runs out at once or never."""
    batches = []
    for kind in sorted(set(kinds), reverse=True):
        rows = [index for index in range(len(lengths)) if kinds[index] == kind]
        rows.sort(key=lambda index: lengths[index], reverse=True)
        batches += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return batches


def cache_bytes(cache: Cache, tokens: torch.LongTensor, visual: torch.LongTensor) -> list[int]:
    """
    Bytes of the KV cache and the visual memory of each row, without padding.

    Args:
        tokens (`torch.LongTensor` `[batch]`): of the row, prompt and answer.
        visual (`torch.LongTensor` `[batch]`): those of images and videos.
    """
    per_token, per_visual_token = bytes_per_token(cache)
    memory = get_visual_memory(cache)
    if memory is not None and not memory.in_kv_cache:
        tokens = tokens - visual
    return (tokens * per_token + visual * per_visual_token).tolist()


def bytes_per_token(cache: Cache) -> tuple[int, int]:
    """Of the KV cache per token, and of the visual memory per visual token."""
    states = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    memory = get_visual_memory(cache)
    of_branches = [] if memory is None else [*memory.keys.values(), *memory.values.values()]
    kv, visual = (sum(tensor[0, :, 0].nbytes for tensor in tensors) for tensors in (states, of_branches))
    return kv, visual


def read_journal(file: Path, kind: type[Entry] = Answer) -> dict[int, Entry]:
    """
    What the journal of an interrupted run has of each row: objects of the dataclass `kind`. An incomplete last line is
    removed from the file.
    """
    answers, complete = {}, 0
    for line in file.read_bytes().splitlines(keepends=True) if file.is_file() else []:
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
            row = entry.pop("row")
            answers[row] = kind(**entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            break
        complete += len(line)
    if file.is_file():
        os.truncate(file, complete)
    return answers


def collect(
    answers: Callable[[set[int]], Iterator[dict[int, Answer]]], rows: int, label: str, journal: Path | None
) -> list[Answer]:
    """
    All answers, in the order of rows, with a progress bar.

    Args:
        answers: from the rows that the journal has to answers of others, a few rows at a time.
        rows (`int`): their number.
        journal (`Path`, *optional*): the file to which answers are appended as they come.
    """
    found = {} if journal is None else read_journal(journal)
    with tqdm(total=rows, initial=len(found), desc=label, unit="row") as bar:
        for new in answers(set(found)):
            bar.update(len(new.keys() - found.keys()))
            found |= new
            if journal is not None:
                with open(journal, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps({"row": row, **asdict(given)}) + "\n" for row, given in new.items())
    return [found[row] for row in range(rows)]


def answer(
    checkpoint: Checkpoint,
    prompts: Prompts,
    limits: Sequence[int],
    batch_size: int,
    label: str,
    ablation: Ablation = INTACT,
    others: Prompts | None = None,
    journal: Path | None = None,
    image_kv_cache: str = "keep",
) -> list[Answer]:
    """
    Greedy answers of a model to all prompts.

    Args:
        limits (`Sequence[int]`): most tokens of each answer.
        label (`str`): of the progress bar.
        ablation (`Ablation`): what is removed from the model.
        others (`Prompts`, *optional*): the same prompts with images of other rows, for `another_memory`.
        image_kv_cache (`str`): argument of models with branches that read the image.
        journal (`Path`, *optional*): the file to which each answered batch is appended; answers in it are reused.
    """
    model, tokenizer = checkpoint.model, checkpoint.processor.tokenizer
    collator = ConversationCollator(tokenizer.pad_token_id, padding_side="left")
    ends = torch.tensor(model.generation_config.eos_token_id)
    # All prompts of a batch are split at the same place. A prompt without an image is not split: nothing changes.
    splits = [distance or 0 if ablation.kind in IN_TWO_PARTS else 0 for distance in prompts.distances]
    kinds = list(zip(limits, splits))

    model_kwargs = ablation.model_kwargs if checkpoint.description.gates else {}
    block = checkpoint.description.block
    if image_kv_cache != "keep" and block is not None and BLOCKS[block].reads_image:
        model_kwargs = {"image_kv_cache": image_kv_cache, **model_kwargs}

    def inputs(prompts: Prompts, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return {key: value.to(model.device) for key, value in collator([prompts[row] for row in rows]).items()}

    @torch.inference_mode()
    def answer_batch(rows: list[int]) -> dict[int, Answer]:
        batch, (limit, distance), cache = inputs(prompts, rows), kinds[rows[0]], None
        if distance:
            other = None if others is None else inputs(others, rows)
            generated = generate_in_two_parts(
                checkpoint.plain_model, batch, other, distance, ablation, limit, ends
            ).cpu()
        else:
            output = model.generate(**batch, max_new_tokens=limit, **model_kwargs, return_dict_in_generate=True)
            generated = output.sequences[:, batch["input_ids"].shape[1] :].cpu()
            cache = output.past_key_values
        ended = torch.isin(generated, ends)
        lengths = (ended.cumsum(dim=1) == 0).sum(dim=1).tolist()
        texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
        sizes: list[int | None] = [None] * len(rows)
        if cache is not None:
            tokens = batch["attention_mask"].sum(dim=1).cpu() + torch.tensor(lengths)
            sizes = cache_bytes(cache, tokens, (batch["mm_token_type_ids"] > 0).sum(dim=1).cpu())
        return {row: Answer(*parts) for row, *parts in zip(rows, texts, lengths, (~ended.any(dim=1)).tolist(), sizes)}

    def answers(found: set[int]) -> Iterator[dict[int, Answer]]:
        batches = make_batches(prompts.lengths, kinds, batch_size)
        return (answer_batch(rows) for rows in batches if not found.issuperset(rows))

    return collect(answers, len(limits), label, journal)


def answer_with_vllm(
    engine: "Engine", prompts: Prompts, limits: Sequence[int], label: str, journal: Path | None = None
) -> list[Answer]:
    """
    As [`answer`], by a model in vLLM.

    Raises:
        UserError: if vLLM reads a prompt differently.
    """
    from pvm.vllm.engine import as_prompt

    conversations, tokenizer = prompts.dataset.conversations, engine.processor.tokenizer

    def answers(found: set[int]) -> Iterator[dict[int, Answer]]:
        left = sorted(set(range(len(limits))) - found, key=lambda row: limits[row], reverse=True)
        requests = ((as_prompt(conversations[row], engine.processor), engine.greedy(limits[row])) for row in left)
        for index, output in engine.generate(requests):
            row, (given,) = left[index], output.outputs
            if len(output.prompt_token_ids) != prompts.lengths[row]:
                raise UserError(
                    f"{conversations.where(row)}: vLLM makes {len(output.prompt_token_ids)} tokens of the prompt, and "
                    f"transformers {prompts.lengths[row]}. Use --backend transformers, and please report this."
                )
            is_cut = given.token_ids[-1] not in engine.ends
            tokens = given.token_ids[: None if is_cut else -1]
            yield {row: Answer(tokenizer.decode(tokens, skip_special_tokens=True), len(tokens), is_cut)}

    return collect(answers, len(limits), label, journal)
