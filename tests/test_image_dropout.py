"""Image dropout: what a micro-batch without the image computes, and which micro-batches those are."""

import json

import peft
import pytest
import torch

import tiny
from pvm.errors import UserError
from pvm.training.image_dropout import ImageDropout, without_image
from pvm.training.methods import LORA_TARGETS
from pvm.training.trainer import PVMTrainingArguments
from tiny import BATCHES
from training import PVM, losses, run, weights


SEED = "2"


def labelled(*rows, padding_side: str) -> dict[str, torch.Tensor]:
    """Labels at text, but not where a visual token or padding predicts it: answers never begin there."""
    batch = tiny.inputs(*rows, padding_side=padding_side)
    visual = batch["mm_token_type_ids"] > 0
    padding = batch["attention_mask"] == 0
    none = visual | padding | visual.roll(1, dims=1) | padding.roll(1, dims=1)
    return {**batch, "labels": batch["input_ids"].masked_fill(none, -100)}


def dense_mask(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """`[batch, 1, query, key]` to add to scores: causal, without padding, and without visual columns for text."""
    length = batch["input_ids"].shape[1]
    visual = batch["mm_token_type_ids"] > 0
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & batch["attention_mask"].bool()[:, None]
    allowed &= visual[..., None] | ~visual[:, None]
    allowed |= torch.eye(length, dtype=torch.bool)
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]


def loss_and_gradients(model, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def of_dense_mask(model, plain, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same with all tokens in the decoder; `plain` is the model without peft's wrapper."""
    names = ("input_ids", "mm_token_type_ids", "attention_mask", "image_grid_thw", "video_grid_thw")
    position_ids, _ = plain.model.get_rope_index(**{name: batch[name] for name in names if name in batch})
    decoder = plain.model.language_model
    stock_mask = dense_mask(batch)
    hook = decoder.register_forward_pre_hook(
        # The decoder's layers take the mask as it is; counting padding needs the 2D one, which text keeps here.
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": stock_mask}),
        with_kwargs=True,
    )
    try:
        return loss_and_gradients(model, **batch, position_ids=position_ids)
    finally:
        hook.remove()


def assert_same(actual, expected):
    (loss, gradients), (expected_loss, expected_gradients) = actual, expected
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    assert gradients.keys() <= expected_gradients.keys() and gradients
    for name, gradient in expected_gradients.items():
        # What the hidden image does not reach is not run at all, and has a gradient of zero here.
        torch.testing.assert_close(gradients.get(name, torch.zeros_like(gradient)), gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("rows", BATCHES)
def test_branches_train_as_under_a_dense_mask(rows, padding_side, checkpointing):
    model = tiny.build().train()
    batch = labelled(*BATCHES[rows], padding_side=padding_side)
    expected = of_dense_mask(model, model, batch)
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = without_image(model, batch)
    assert ("image_kv_cache" in inputs) == (rows != "text only")
    assert_same(loss_and_gradients(model, **inputs), expected)
    if rows != "text only":
        visible = loss_and_gradients(model, **batch)[0]
        assert (visible - expected[0]).abs() > 1e-3, "hiding the image changes the loss"


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("rows", BATCHES)
def test_controls_train_as_under_a_dense_mask(rows, padding_side, lora):
    plain = model = tiny.build_stock().train()
    if lora:
        model = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=LORA_TARGETS))
    batch = labelled(*BATCHES[rows], padding_side=padding_side)
    expected = of_dense_mask(model, plain, batch)
    inputs = without_image(model, batch)
    assert ("pixel_values" in inputs or "pixel_values_videos" in inputs) is False
    assert_same(loss_and_gradients(model, **inputs), expected)


def test_the_decoder_sees_text_alone():
    model = tiny.build().train()
    batch = labelled(*BATCHES["several images"], padding_side="right")
    lengths = []
    for layer in model.model.language_model.layers:
        layer.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    states = model.model(**{k: v for k, v in without_image(model, batch).items() if k != "labels"}, use_cache=False)
    text = (batch["attention_mask"] - (batch["mm_token_type_ids"] > 0).long()).sum(dim=1)
    assert lengths == [int(text.max())] * 4
    assert states.last_hidden_state.shape[1] == batch["input_ids"].shape[1]
    hidden = (batch["mm_token_type_ids"] > 0) | (batch["attention_mask"] == 0)
    assert (states.last_hidden_state[hidden] == 0).all() and (states.last_hidden_state[~hidden] != 0).any(-1).all()


def test_the_same_micro_batches_on_all_ranks_and_when_resumed():
    def drawn(share: float, seed: int, steps: range) -> list[bool]:
        hides = ImageDropout(share, seed)
        return [hides(step) for step in steps for _ in range(4)]

    all_steps = drawn(0.3, 0, range(250))
    assert drawn(0.3, 0, range(100, 250)) == all_steps[400:]
    assert drawn(0.3, 1, range(250)) != all_steps
    assert 0.25 < sum(all_steps) / len(all_steps) < 0.35
    assert not any(drawn(0, 0, range(50))) and all(drawn(1, 0, range(50)))


def test_a_share_above_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="between 0 and 1"):
        PVMTrainingArguments(output_dir=str(tmp_path), image_dropout=50, use_cpu=True)


@pytest.mark.parametrize("flags", [PVM, ("--method", "lora")], ids=["pvm", "lora"])
def test_train_py(base, conversations, tmp_path, flags):
    """Resumed, it is the run that was not interrupted; the checkpoint says how it was trained."""
    dropout = ("--image_dropout", "0.5", "--seed", SEED, "--save_steps", "2")
    hides = ImageDropout(0.5, int(SEED))
    assert len({hides(step) for step in range(2, 4)}) == 2, "after the interruption there is one of each kind"
    whole = run(base, conversations, tmp_path / "whole", *flags, *dropout)
    again = tmp_path / "again"
    checkpoint = str(whole / "checkpoint-2")
    run(base, conversations, again, *flags, *dropout, "--resume_from_checkpoint", checkpoint)
    assert losses(again) == losses(whole)
    assert all(torch.equal(weight, weights(again)[name]) for name, weight in weights(whole).items())
    record = json.loads((whole / "training.json").read_text())
    assert record["arguments"]["image_dropout"] == 0.5 and "image_dropout 0.5" in (whole / "README.md").read_text()
    if flags is PVM:
        config = json.loads((whole / "config.json").read_text())
        assert config["text_config"]["pvm_training"]["image_dropout"] == 0.5
    plain = run(base, conversations, tmp_path / "plain", *flags, "--seed", SEED)
    assert losses(plain) != losses(whole)
    with pytest.raises(UserError, match="that run had --image_dropout 0.5"):
        run(base, conversations, tmp_path / "other", *flags, "--seed", SEED, "--resume_from_checkpoint", checkpoint)
