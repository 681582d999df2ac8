"""How much less likely an answer is when its images are gray."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from pvm.checkpoints.loading import Checkpoint
from pvm.data.encoding import IGNORE_INDEX, ConversationCollator, ConversationDataset
from pvm.data.sources import Conversations
from pvm.evaluation.ablations import ChangedImages
from pvm.evaluation.answering import make_batches, read_journal


CHUNK = 1024  # tokens whose logits are computed together: 16,384 tokens of Qwen3-VL would take 10 GB


@dataclass
class Measured:
    """
    tokens (`int`): of the last answer, with its end token.
    log_probability (`float`): of these tokens after the prompt, in nats.
    gray (`float`): the same with gray images.
    """

    tokens: int
    log_probability: float
    gray: float

    @property
    def drop(self) -> float:
        """Nats per token."""
        return (self.log_probability - self.gray) / self.tokens


@torch.inference_mode()
def answer_log_probabilities(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[list[int], list[float]]:
    """
    The number of labels of each row of a right-padded batch, and their log-probability in nats.

    Args:
        batch: of [`ConversationCollator`], with `labels` `[batch, sequence]`.
    """
    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:].to(hidden.device)
    is_label = labels != IGNORE_INDEX
    chosen = []
    for states, tokens in zip(hidden[is_label].split(CHUNK), labels[is_label].split(CHUNK)):
        logits = model.lm_head(states).float()  # with tied embeddings perhaps on another GPU
        chosen.append(-torch.nn.functional.cross_entropy(logits, tokens.to(logits.device), reduction="none").cpu())
    counts = is_label.sum(dim=1).tolist()
    return counts, [float(row.double().sum()) for row in torch.cat(chosen).split(counts)]


def measure(
    checkpoint: Checkpoint, conversations: Conversations, lengths: list[int], batch_size: int, journal: Path
) -> dict[int, Measured]:
    """
    Measure rows with images, by their numbers in the data set. The same rows always make the same batches, also if the
    journal has some of them.

    Args:
        lengths (`list[int]`): tokens of each row.
        journal (`Path`): the file to which each batch is appended; what is in it is not measured again.
    """
    processor, model = checkpoint.processor, checkpoint.plain_model
    collator = ConversationCollator(processor.tokenizer.pad_token_id)
    intact, gray = (
        ConversationDataset(rows, processor, train_on="last")
        for rows in (conversations, ChangedImages(conversations, blank=True))
    )
    measured = read_journal(journal, Measured)
    batches = make_batches(lengths, [None] * len(lengths), batch_size)
    left = [batch for batch in batches if not all(conversations.rows[index] in measured for index in batch)]
    done = len(lengths) - sum(map(len, left))
    with tqdm(total=len(lengths), initial=done, desc=f"gray images, {conversations.name}", unit="row") as bar:
        for batch in left:
            tokens, as_is = answer_log_probabilities(model, collator([intact[index] for index in batch]))
            _, without = answer_log_probabilities(model, collator([gray[index] for index in batch]))
            rows = [conversations.rows[index] for index in batch]
            measured |= {row: Measured(*values) for row, *values in zip(rows, tokens, as_is, without)}
            with open(journal, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"row": row, **asdict(measured[row])}) + "\n" for row in rows)
            bar.update(len(batch))
    return {row: measured[row] for row in conversations.rows}


def journal_name(name: str, settings: list) -> str:
    """A file name that changes with anything that measurements depend on, so that they are never mixed."""
    return f"{name}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}.jsonl"
