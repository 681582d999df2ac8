"""
Properties that hold for every layout of text, images and videos: the logits of a prefix are the prefix of the logits,
also if a cache is filled in several turns, and rows of a batch do not affect each other.
"""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import tiny


MODEL = {causal: tiny.build(pvm_causal=causal) for causal in (True, False)}
SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,  # the same layouts in every run
    suppress_health_check=[HealthCheck.too_slow],
)

seeds = st.integers(0, 99)
sides = st.sampled_from([4, 8, 12])
texts = st.builds(tiny.text, st.integers(1, 6), seeds)
images = st.builds(tiny.image, sides, sides, seeds)
videos = st.builds(tiny.video, st.integers(1, 3), sides, sides, seeds)
# A turn of a conversation; it begins with text, so that none is empty.
turns = st.builds(lambda first, rest: [first, *rest], texts, st.lists(st.one_of(texts, images, videos), max_size=4))


def joined(turns) -> list:
    """One row with the parts of all turns."""
    return list(itertools.chain.from_iterable(turns))


def assert_same(actual: torch.Tensor, expected: torch.Tensor):
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-5)


@SETTINGS
@given(row=st.lists(turns, min_size=2, max_size=4))
def test_prefix(row):
    model = MODEL[True]
    whole = tiny.logits(model, tiny.inputs(joined(row)))
    prefix = tiny.logits(model, tiny.inputs(joined(row[:-1])))
    assert_same(whole[:, : prefix.shape[1]], prefix)


@SETTINGS
@given(
    rows=st.integers(1, 3).flatmap(
        lambda size: st.lists(st.lists(turns, min_size=size, max_size=size), min_size=1, max_size=4)
    )
)
def test_turns_on_a_cache(rows):
    """Each of `rows` is a turn of all conversations, padded to the longest."""
    model = MODEL[True]
    cache = DynamicCache(config=model.config)
    outputs, mask = [], torch.zeros(len(rows[0]), 0, dtype=torch.long)
    for turn in rows:
        batch = tiny.inputs(*turn)
        real = batch["attention_mask"].bool()
        mask = batch["attention_mask"] = torch.cat([mask, batch["attention_mask"]], dim=1)
        logits = tiny.logits(model, batch, past_key_values=cache, use_cache=True)
        outputs.append([row[row_real] for row, row_real in zip(logits, real, strict=True)])
    for index in range(len(rows[0])):
        alone = tiny.logits(model, tiny.inputs(joined(turn[index] for turn in rows)))[0]
        assert_same(torch.cat([turn[index] for turn in outputs]), alone)


@pytest.mark.parametrize("causal", MODEL)
@SETTINGS
@given(rows=st.lists(turns, min_size=2, max_size=4), padding_side=st.sampled_from(["left", "right"]))
def test_rows_are_independent(rows, padding_side, causal):
    batch = tiny.inputs(*rows, padding_side=padding_side)
    logits = tiny.logits(MODEL[causal], batch)
    for row, row_logits, real in zip(rows, logits, batch["attention_mask"].bool(), strict=True):
        assert_same(row_logits[real], tiny.logits(MODEL[causal], tiny.inputs(row))[0])
