"""Where the text dilutes the question (benchmarks/diluted_question.py)."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.diluted_question import SHARPER, encode, hidden_text, question_shares, sharper
from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration
from pvm.checkpoints.loading import load_checkpoint
from pvm.worlds import conversations
from pvm.worlds.digits import Digits
from tiny import set_gates


BACKBONE = Path(__file__).parents[1] / "assets" / "digits-backbone"
LENGTH = 40


@pytest.fixture(scope="module")
def checkpoint():
    config = Qwen3VLPVMConfig.from_pretrained(BACKBONE)
    config.text_config.pvm_hidden_size = 64
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(BACKBONE, config=config).eval()
    set_gates(model, 0.5)
    return replace(load_checkpoint(str(BACKBONE)), model=model)


@pytest.fixture(scope="module")
def row():
    return conversations.cell_row(Digits.load("train"), LENGTH, 1, np.random.default_rng(3))


def test_text_hidden_in_all_layers_does_not_matter_and_in_one_it_does(checkpoint, row):
    inputs, question = encode(checkpoint, row, LENGTH)
    end = inputs["input_ids"].shape[1] - question
    assert checkpoint.processor.decode(inputs["input_ids"][0, end:]).startswith("\nCell ")
    other = inputs["input_ids"].clone()
    other[0, end - LENGTH : end] = other[0, end - LENGTH : end].flip(0)
    layers = [layer.self_attn for layer in checkpoint.model.model.language_model.layers]

    @torch.no_grad()
    def change(hiding: list) -> float:
        with ExitStack() as stack:
            for attention in hiding:
                stack.enter_context(hidden_text(attention, LENGTH, question))
            options = {**inputs, "image_kv_cache": "skip", "logits_to_keep": 1}
            first, second = (
                checkpoint.model(**{**options, "input_ids": ids}).logits for ids in (inputs["input_ids"], other)
            )
        return (first - second).abs().max().item()

    assert change(layers) < 1e-4
    assert min(change([]), change(layers[:1])) > 1e-2  # and nothing stays hidden


def test_the_question_gets_all_attention_where_there_is_no_text(checkpoint, row):
    """All but what the few tokens before the text get."""
    checkpoint.model.set_attn_implementation("eager")
    empty = conversations.cell_row(Digits.load("train"), 0, 1, np.random.default_rng(3))
    near, far = question_shares(checkpoint, [empty], 0), question_shares(checkpoint, [row], LENGTH)
    assert max(near) <= 1 + 1e-6 and all(0 < later < first for first, later in zip(near, far))


@torch.no_grad()
def test_sharper_attention_has_larger_logits(checkpoint, row):
    checkpoint.model.set_attn_implementation("eager")
    inputs, question = encode(checkpoint, row, LENGTH)
    first = checkpoint.model.model.language_model.layers[0].self_attn  # whose input the change does not alter

    def log_weights() -> torch.Tensor:
        output = checkpoint.model(**inputs, image_kv_cache="skip", output_attentions=True)
        return output.attentions[0][0, :, -1].log()

    before = log_weights()
    with sharper(first, LENGTH, question):
        after = log_weights()
    torch.testing.assert_close(after, (SHARPER * before).log_softmax(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_weights(), before)
