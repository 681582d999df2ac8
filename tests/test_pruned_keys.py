"""The rival of a memory: visual keys pruned without training (benchmarks/pruned_keys.py)."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from benchmarks.pruned_keys import answer, cells_of, encode, image_bytes, prune
from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration
from pvm.checkpoints.loading import load_checkpoint
from pvm.worlds import conversations
from pvm.worlds.digits import Digits
from tiny import set_gates


BACKBONE = Path(__file__).parents[1] / "assets" / "digits-backbone"


@pytest.fixture(scope="module")
def base():
    checkpoint = load_checkpoint(str(BACKBONE))
    checkpoint.model.set_attn_implementation("eager")
    return checkpoint


@pytest.mark.parametrize("task", ["list", "cell"])
def test_unpruned_answers_are_those_of_generate(base, task):
    world, rng = Digits.load("test"), np.random.default_rng(3)
    row = (
        conversations.list_row(world, 20, 0, 15, rng) if task == "list" else conversations.cell_row(world, 20, 2, rng)
    )
    inputs, _, _ = encode(base, row)
    with torch.no_grad():
        tokens = base.model.generate(**inputs, max_new_tokens=60)[0, inputs["input_ids"].shape[1] :]
    expected = base.processor.decode(tokens, skip_special_tokens=True).strip()
    found, size = answer(base, row, kept=16, image_kv_cache="keep", longest=60)
    config = base.model.config.text_config
    assert found == expected
    assert size == 2 * 4 * 16 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert answer(base, row, kept=4, image_kv_cache="keep", longest=60)[1] == size / 4


@pytest.mark.parametrize("image_kv_cache", ["keep", "evict", "skip"])
def test_answers_with_branches_are_those_of_generate(base, image_kv_cache):
    config = Qwen3VLPVMConfig.from_pretrained(BACKBONE)
    config.text_config.pvm_hidden_size = 64
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(BACKBONE, config=config).eval()
    set_gates(model, 0.5)
    row = conversations.list_row(Digits.load("test"), 20, 0, 15, np.random.default_rng(3))
    inputs, _, _ = encode(base, row)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=60, do_sample=False, image_kv_cache=image_kv_cache)
    expected = base.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    found, size = answer(replace(base, model=model), row, None, image_kv_cache, longest=60)
    text = config.text_config
    states = len(text.pvm_layers) * text.pvm_num_key_value_heads
    if image_kv_cache == "keep":
        states += text.num_hidden_layers * text.num_key_value_heads
    assert found == expected and size == 2 * 4 * 16 * text.head_dim * states


def test_columns_with_most_attention_are_kept():
    """Text at 0 and 5; the layers differ in what the last query attends to."""
    cache, states = DynamicCache(), torch.arange(6.0).view(1, 1, 6, 1)
    weights = [torch.zeros(1, 2, 6, 6) for _ in range(2)]
    for layer, favourites in enumerate(([2, 4], [1, 3])):
        cache.update(states, states, layer)
        weights[layer][:, :, -1, favourites] = 0.5
    prune(cache, tuple(weights), torch.tensor([False, True, True, True, True, False]), kept=2)
    assert [layer.keys.flatten().tolist() for layer in cache.layers] == [[0, 2, 4, 5], [0, 1, 3, 5]]
    assert image_bytes(cache, text_tokens=2) == 2 * 2 * 2 * 4


def test_lists_are_scored_by_cell():
    assert cells_of("Cells alpha7 bravo3") == ["alpha7", "bravo3"]
    assert cells_of("Cells alpha sun bravo music charlie") == ["alpha sun", "bravo music", "charlie"]
    assert cells_of("sun") == ["sun"] and cells_of("") == [""]
