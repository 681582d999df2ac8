"""
Why branches fail after long texts: self-attention must fetch what is asked for, and the text dilutes that.

    python -m benchmarks.diluted_question --models runs/digits_pvm

Questions about cells after 256 to 4,096 tokens of text; pictures of the training split, which no report uses. The
image never enters the decoder (`image_kv_cache="skip"`). Two tables for each model:

- right answers as it is; when in one layer, but not in the others, the text is hidden from the question; and when all
  logits of attention in one layer are 1.5 times as large;
- how much of the last token's attention the question's tokens get in each layer, in the head in which they get most.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from benchmarks.common import print_table
from benchmarks.pruned_keys import plain_messages
from pvm.checkpoints.loading import Checkpoint, load_checkpoint
from pvm.worlds import conversations
from pvm.worlds.data import WORLDS


LENGTHS = (256, 1024, 4096)
SHARPER = 1.5
SHARE_ROWS = 10  # whole attention matrices are large


def encode(checkpoint: Checkpoint, row: dict, length: int) -> tuple[dict, int]:
    """The prompt of a conversation with `length` tokens of text, and how many tokens follow that text."""
    processor = checkpoint.processor
    prompt = processor.apply_chat_template(plain_messages(row)[:-1], add_generation_prompt=True)
    after = processor.tokenizer(prompt.rpartition("<|vision_end|>")[2])["input_ids"]
    return processor(text=[prompt], images=row["images"], return_tensors="pt"), len(after) - length


@contextmanager
def hidden_text(attention: nn.Module, length: int, question: int) -> Iterator[None]:
    """In a layer's `attention` the last `question` tokens do not see the `length` tokens before them."""

    def hide(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        states = kwargs["hidden_states"]
        mask = torch.full((states.shape[1],) * 2, torch.finfo(states.dtype).min, dtype=states.dtype).triu(1)
        mask[-question:, -question - length : -question] = torch.finfo(states.dtype).min
        return args, {**kwargs, "attention_mask": mask[None, None]}

    handle = attention.register_forward_pre_hook(hide, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def sharper(attention: nn.Module, length: int, question: int) -> Iterator[None]:
    """A layer's `attention` with larger logits, whatever the text."""
    handle = attention.q_norm.register_forward_hook(lambda module, args, states: SHARPER * states)
    try:
        yield
    finally:
        handle.remove()


CHANGES = {"text hidden in layer {}": hidden_text, "sharper attention in layer {}": sharper}


@torch.no_grad()
def right_answers(checkpoint: Checkpoint, rows: list[dict], length: int, change=None, layer_idx: int = 0) -> int:
    """How many first tokens of answers are right, with one of `CHANGES` in a layer, if given."""
    model, right = checkpoint.plain_model, 0
    for row in rows:
        inputs, question = encode(checkpoint, row, length)
        attention = model.model.language_model.layers[layer_idx].self_attn
        with nullcontext() if change is None else change(attention, length, question):
            found = model(**inputs, image_kv_cache="skip", logits_to_keep=1).logits[0, -1].argmax().item()
        right += found == checkpoint.processor.tokenizer(row["messages"][-1]["content"][0]["text"])["input_ids"][0]
    return right


@torch.no_grad()
def question_shares(checkpoint: Checkpoint, rows: list[dict], length: int) -> list[float]:
    """By layer, the mean share of the last token's attention that the question gets, in the head with the largest."""
    shares = []
    for row in rows:
        inputs, question = encode(checkpoint, row, length)
        output = checkpoint.plain_model(**inputs, image_kv_cache="skip", logits_to_keep=1, output_attentions=True)
        shares.append([weights[0, :, -1, -question:].sum(-1).tolist() for weights in output.attentions])
    return np.mean(shares, axis=0).max(axis=1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", required=True, nargs="+", help="checkpoints with branches")
    parser.add_argument("--world", choices=sorted(WORLDS), default="digits")
    parser.add_argument("--rows", type=int, default=30, help="questions for each length")
    args = parser.parse_args()
    world, rng = WORLDS[args.world].load("train"), np.random.default_rng(15)
    rows = {length: [conversations.cell_row(world, length, 1, rng) for _ in range(args.rows)] for length in LENGTHS}
    for path in args.models:
        checkpoint = load_checkpoint(path)
        layers = range(checkpoint.plain_model.config.text_config.num_hidden_layers)
        settings = {"as it is": (None, 0)}
        settings |= {name.format(layer): (change, layer) for name, change in CHANGES.items() for layer in layers}
        table = [
            [name, *(str(right_answers(checkpoint, rows[length], length, *setting)) for length in LENGTHS)]
            for name, setting in tqdm(settings.items(), desc=path)
        ]
        checkpoint.plain_model.set_attn_implementation("eager")  # which returns attention
        shares = zip(*(question_shares(checkpoint, rows[n][:SHARE_ROWS], n) for n in LENGTHS))
        lengths = [f"after {length:,} tokens" for length in LENGTHS]
        print_table(f"{path}: right answers of {args.rows}", ["", *lengths], table)
        labels = [f"layer {layer}" for layer in layers]
        lines = [[label, *(f"{share:.0%}" for share in line)] for label, line in zip(labels, shares)]
        print_table("attention to the question", ["", *lengths], lines)


if __name__ == "__main__":
    main()
