"""The model: parity, initialisation, who attends to what, training, saving and loading."""

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.utils import TransformersKwargs

import tiny
from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import (
    Qwen3VLPVMBlock,
    Qwen3VLPVMCrossAttention,
    Qwen3VLPVMForConditionalGeneration,
    Qwen3VLPVMModel,
    refuse_misspelt,
)
from tiny import BATCHES, branches, image, text, video


ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "tests" / "reference_case"
REFERENCE_INPUTS = ("a_one_image", "b_two_sizes_left")
METADATA = {"method": "pvm", "step": 10}


def pvm_parameters(model) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".pvm_block." in name}


def train_branches_only(model):
    model.train().requires_grad_(False)
    for block in branches(model):
        block.requires_grad_(True)
    return model


def loss(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = batch["input_ids"].masked_fill(batch["mm_token_type_ids"] > 0, -100)
    return model(**batch, labels=labels, use_cache=False).loss


def gradients(model, batch, names: str = ".pvm_block.") -> dict[str, torch.Tensor]:
    """Copies of the gradients of the parameters whose names contain `names`, after one backward pass."""
    model.zero_grad()
    loss(model, batch).backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if names in name and parameter.requires_grad
    }


def assert_same_gradients(actual: dict, expected: dict, atol: float = 1e-6, rtol: float = 1e-4):
    assert actual.keys() == expected.keys() and len(expected) > 0
    for name in expected:
        assert torch.allclose(actual[name], expected[name], atol=atol, rtol=rtol), name


# ---------------------------------------------------------------------------------------------- the reference


def reference_inputs(name: str) -> dict[str, torch.Tensor]:
    batch = load_file(REFERENCE / f"{name}.inputs.safetensors")
    return {**batch, "mm_token_type_ids": (batch["input_ids"] == 990).long()}


@pytest.fixture(scope="module")
def reference_model():
    return Qwen3VLPVMForConditionalGeneration.from_pretrained(REFERENCE, dtype=torch.float32).eval()


def test_reference_checkpoint_is_read_without_causality(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    config = Qwen3VLPVMConfig.from_pretrained(REFERENCE)
    assert config.text_config.pvm_causal is False
    assert any("pvm_causal=False" in record.getMessage() for record in caplog.records)


def test_reference_weights_load_without_renaming():
    _, info = Qwen3VLPVMForConditionalGeneration.from_pretrained(REFERENCE, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", REFERENCE_INPUTS)
def test_reference_logits(reference_model, name, attn_implementation):
    model = copy.deepcopy(reference_model)
    model.set_attn_implementation(attn_implementation)
    batch, expected = reference_inputs(name), load_file(REFERENCE / f"{name}.logits.safetensors")
    real = batch["attention_mask"].bool()

    torch.testing.assert_close(tiny.logits(model, batch)[real], expected["logits"][real], atol=1e-4, rtol=0)
    tiny.set_gates(model, 0.0)
    torch.testing.assert_close(tiny.logits(model, batch)[real], expected["logits_gate_zero"][real], atol=1e-4, rtol=0)
    assert (expected["logits"] - expected["logits_gate_zero"])[real].abs().max() > 0.1, "the branches must matter"


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", REFERENCE_INPUTS)
def test_reference_greedy_tokens(reference_model, name, use_cache):
    batch = reference_inputs(name)
    tokens = reference_model.generate(
        **batch, max_new_tokens=20, min_new_tokens=20, do_sample=False, use_cache=use_cache, pad_token_id=0
    )
    expected = load_file(REFERENCE / f"{name}.greedy.safetensors")["new_tokens"]
    assert tokens[:, batch["input_ids"].shape[1] :].tolist() == expected.tolist()


def test_reference_loss_and_gradients(reference_model):
    expected = load_file(REFERENCE / "a_one_image.grads.safetensors")
    model = train_branches_only(copy.deepcopy(reference_model)).eval()
    output = model(**reference_inputs("a_one_image"), labels=expected["labels"])
    output.loss.backward()

    torch.testing.assert_close(output.loss, expected["loss"][0], atol=1e-5, rtol=0)
    recorded = {name.removeprefix("grad."): grad for name, grad in expected.items() if name.startswith("grad.")}
    assert_same_gradients({name: p.grad for name, p in pvm_parameters(model).items()}, recorded, atol=1e-5, rtol=1e-3)


def test_reference_checkpoint_without_its_branches_is_refused(tmp_path):
    weights = load_file(REFERENCE / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".pvm_block." not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((REFERENCE / "config.json").read_text())
    with pytest.raises(ValueError, match="lacks 30 weights, e.g. layers.1.pvm_block"):
        Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("hidden_size", "layers", "intermediate_size", "heads", "key_value_heads", "parameters"),
    [
        pytest.param(4096, 36, 12288, 32, 8, 27_922_179, id="8B"),
        pytest.param(2560, 36, 9728, 32, 8, 22_728_963, id="4B"),
        pytest.param(2048, 28, 6144, 16, 8, 18_878_211, id="2B"),
        pytest.param(5120, 64, 25600, 64, 8, 37_359_363, id="32B"),
    ],
)
def test_number_of_parameters(hidden_size, layers, intermediate_size, heads, key_value_heads, parameters):
    stock = tiny.stock_config(
        text={
            "vocab_size": 151936,
            "hidden_size": hidden_size,
            "num_hidden_layers": layers,
            "intermediate_size": intermediate_size,
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "head_dim": 128,
        }
    )
    config = Qwen3VLPVMConfig.from_stock(stock)
    with torch.device("meta"):
        model = Qwen3VLPVMForConditionalGeneration(config)
    assert sum(parameter.numel() for parameter in pvm_parameters(model).values()) == parameters


# ---------------------------------------------------------------------------------------------- initialisation


def built_directly(folder):
    stock = Qwen3VLForConditionalGeneration.from_pretrained(folder)
    model = Qwen3VLPVMForConditionalGeneration(Qwen3VLPVMConfig.from_stock(stock.config, pvm_layers=[1, 2]))
    missing, unexpected = model.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected and all(".pvm_block." in name for name in missing)
    return model


def built_on_meta(folder):
    """Built without storage and given weights later, as by FSDP."""
    stock = Qwen3VLForConditionalGeneration.from_pretrained(folder)
    with torch.device("meta"):
        model = Qwen3VLPVMForConditionalGeneration(Qwen3VLPVMConfig.from_stock(stock.config, pvm_layers=[1, 2]))
    return Qwen3VLPVMForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=stock.state_dict())


def loaded(**kwargs):
    return lambda folder: Qwen3VLPVMForConditionalGeneration.from_pretrained(folder, **kwargs)


WAYS_TO_START = {
    "float32": loaded(dtype=torch.float32),
    "bfloat16": loaded(dtype=torch.bfloat16),
    "dtype auto": loaded(dtype="auto"),
    "device_map cpu": loaded(device_map="cpu"),
    "device_map auto": loaded(device_map="auto"),
    "eager": loaded(attn_implementation="eager"),
    "built directly": built_directly,
    "built on meta": built_on_meta,
}


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory):
    """A stock checkpoint with the real `initializer_range`, and the real `head_dim`, which the default width fits."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    folder = tmp_path_factory.mktemp("stock")
    tiny.build_stock({"head_dim": 128, "initializer_range": 0.02, "rope_parameters": rope}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", WAYS_TO_START)
def test_starts_as_the_stock_model(stock_folder, way):
    # So that uninitialised parameters are likely to get memory with large values in it.
    garbage = [torch.full((size,), 1e4) for size in (1, 16, 128, 512, 4096, 65536) for _ in range(20)]
    del garbage
    model = WAYS_TO_START[way](stock_folder).eval()
    assert len(branches(model)) == len(model.config.text_config.pvm_layers) >= 2

    for name, parameter in pvm_parameters(model).items():
        if name.endswith("gate_alpha"):
            assert parameter.item() == 0.0, name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:  # W_out too: were it zero like the gate, neither would get a gradient
            assert parameter.float().std().item() == pytest.approx(0.02, rel=0.2), name
            assert abs(parameter.float().mean().item()) < 2e-3, name

    stock = Qwen3VLForConditionalGeneration.from_pretrained(
        stock_folder, dtype=model.dtype, attn_implementation=model.config._attn_implementation
    ).eval()
    for rows in BATCHES.values():
        batch = tiny.inputs(*rows)
        assert torch.equal(tiny.logits(model, batch), tiny.logits(stock, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_backward_reaches_every_gate_and_two_steps_move_every_branch_parameter(stock_folder, dtype):
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(stock_folder, dtype=dtype)
    train_branches_only(model)
    for block in branches(model):
        block.float()  # as train.py does
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(pvm_parameters(model).values(), lr=1e-3, weight_decay=0.0)
    batch = tiny.inputs(*BATCHES["several images"])

    loss(model, batch).backward()
    for block in branches(model):
        assert block.gate_alpha.grad.item() != 0.0
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        loss(model, batch).backward()

    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (".pvm_block." in name), name


# ---------------------------------------------------------------------------------------------- who attends to what


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_text_attends_only_to_images_before_it(attn_implementation):
    model = tiny.build(attn_implementation=attn_implementation)
    first = [text(3), image(), text(4, 1)]
    batch, other = (tiny.inputs([*first, image(seed=seed), text(5, 2)]) for seed in (1, 2))
    second_image = len(tiny.inputs(first)["input_ids"][0]) + 1

    a, b = tiny.logits(model, batch), tiny.logits(model, other)
    assert torch.equal(a[:, :second_image], b[:, :second_image])
    assert (a - b)[:, second_image + 4 :].abs().amax(-1).min() > 1e-2

    model.config.text_config.pvm_causal = False
    a, b = tiny.logits(model, batch), tiny.logits(model, other)
    assert (a - b)[:, :second_image].abs().amax(-1)[0, 0] > 1e-2, "without causality the first token attends to it"


@pytest.mark.parametrize("causal", [True, False])
def test_every_image_is_attended_to(causal):
    """After several images and videos the last token depends on each of them, through the branch alone."""
    model = tiny.build(pvm_layers=[3], pvm_causal=causal)
    seen = []

    def see(module, args, output):
        seen.append(output)

    branches(model)[0].register_forward_hook(see)
    for changed in range(4):
        for seed in (0, 100):
            seeds = [index + (seed if index == changed else 0) for index in range(4)]
            row = [text(2), image(seed=seeds[0]), text(2, 1), video(2, 4, 4, seeds[1]), image(4, 8, seeds[2])]
            with torch.no_grad():  # the text tokens' stream is the same: only the visual memory differs
                tiny.logits(model, tiny.inputs([*row, text(2, 2), video(1, 4, 4, seeds[3]), text(3, 3)]))
        assert (seen[-1] - seen[-2])[0, -1].abs().max() > 1e-3, f"visual {changed} is not attended to"


@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("causal", [True, False])
def test_without_an_image_the_branch_is_exactly_zero(attention_bias, attn_implementation, causal):
    config = tiny.pvm_config(
        text={"attention_bias": attention_bias}, attn_implementation=attn_implementation, pvm_causal=causal
    )
    model = tiny.build(config)
    if attention_bias:
        assert all(block.cross_attn.o_proj.bias.abs().max() > 0.1 for block in branches(model))
    batch = tiny.inputs([text(4), image(), text(5, 1)], [text(7, 2)], padding_side="right")
    on = tiny.logits(model, batch)
    tiny.set_gates(model, 0.0)
    off = tiny.logits(model, batch)

    assert torch.equal(on[1], off[1]), "a row without an image"
    assert torch.equal(on[0, :5], off[0, :5]) == causal, "tokens before the first image"
    assert (on - off)[0, 9:].abs().amax(-1).min() > 1e-2, "tokens after it"


@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("causal", [True, False])
def test_each_row_of_a_batch_is_as_if_alone(attention_bias, padding_side, causal):
    model = tiny.build(tiny.pvm_config(text={"attention_bias": attention_bias}, pvm_causal=causal))
    rows = [*BATCHES["mixed rows"], *BATCHES["several images"], *BATCHES["text only"]]
    batch = tiny.inputs(*rows, padding_side=padding_side)
    together = tiny.logits(model, batch)
    for index, row in enumerate(rows):
        alone = tiny.logits(model, tiny.inputs(row))[0]
        real = batch["attention_mask"][index].bool()
        torch.testing.assert_close(together[index][real], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_forward_of_a_prefix_is_the_prefix_of_the_forward(causal):
    model = tiny.build(pvm_causal=causal)
    parts = [text(3), image(), text(3, 1), video(2, 4, 4, 1), text(2, 2), image(4, 8, 2), text(4, 3)]
    whole = tiny.logits(model, tiny.inputs(parts))[0]
    equal = []
    for count in range(1, len(parts)):
        prefix = tiny.logits(model, tiny.inputs(parts[:count]))[0]
        equal.append(torch.allclose(prefix, whole[: len(prefix)], atol=1e-5, rtol=1e-5))
    # Without causality, only the last prefix agrees, which holds every image.
    assert equal == [causal] * (len(equal) - 1) + [True]


def test_causal_attention_is_attention_to_all_of_the_prefix():
    """With its only branch in the last layer, each token's logits are the non-causal model's for the prefix."""
    causal, free = (tiny.build(pvm_layers=[3], pvm_causal=value) for value in (True, False))
    row = [text(2), image(), text(2, 1), video(2, 4, 4, 1), text(1, 2), image(4, 8, 2), text(2, 3)]
    whole = tiny.logits(causal, tiny.inputs(row))[0]
    start = 0
    for count in range(1, len(row) + 1):
        # A prefix cannot end inside an image, and all tokens of a part attend to the same images: those before it.
        prefix = tiny.logits(free, tiny.inputs(row[:count]))[0]
        if isinstance(row[count - 1], list):
            torch.testing.assert_close(whole[start : len(prefix)], prefix[start:], atol=1e-5, rtol=1e-5)
        start = len(prefix)


def test_visual_positions_get_nothing_and_cost_nothing():
    model = tiny.build()
    rows = [[text(3), image(), text(4, 1), image(4, 8, 1), text(5, 2)], [text(8, 3), image(seed=2), text(2)]]
    batch = tiny.inputs(*rows)
    queries, streams = [], []
    layer = model.model.language_model.layers[1]
    layer.pvm_block.register_forward_pre_hook(lambda module, args: queries.append(args[0].shape[1]))
    layer.register_forward_hook(lambda module, args, output: streams.append(output))
    tiny.logits(model, batch)
    tiny.set_gates(model, 0.0)
    tiny.logits(model, batch)

    injected = (streams[0] - streams[1]).abs().amax(-1)
    visual = batch["mm_token_type_ids"] > 0
    after_an_image = visual.cumsum(1) > 0
    assert (injected[visual] == 0).all()
    assert (injected[~after_an_image] == 0).all()
    assert (injected[after_an_image & ~visual] > 1e-2).all()
    # Only text that attends to something goes through the branch; the row with the most sets the number of queries.
    assert queries[0] == (after_an_image & ~visual).sum(1).max()


@pytest.mark.parametrize("causal", [True, False])
def test_no_softmax_over_an_empty_row(causal):
    """Queries without keys are zeroed after the attention, whose kernels may give NaN for them."""
    model = tiny.build(pvm_causal=causal)
    masks = []
    for block in branches(model):
        block.register_forward_pre_hook(lambda module, args: masks.append(args[2].mask))
    batch = tiny.inputs(*BATCHES["mixed rows"])
    tiny.logits(model, batch)
    model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=tiny.PAD_TOKEN)
    assert len(masks) == 2 + 2 * 3
    assert all(mask.any(dim=-1).all() and not mask.all() for mask in masks)


def test_eager_equals_sdpa():
    eager, sdpa = (tiny.build(attn_implementation=implementation) for implementation in ("eager", "sdpa"))
    for rows in BATCHES.values():
        batch = tiny.inputs(*rows)
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(
            tiny.logits(eager, batch)[real], tiny.logits(sdpa, batch)[real], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ["one image", "several images"])
def test_flash_attention_gets_neither_a_mask_nor_float32(monkeypatch, rows, dtype):
    """Flash attention needs a GPU, so a stand-in checks what it would get."""
    reached = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        if isinstance(module, Qwen3VLPVMCrossAttention):
            assert attention_mask is None and query.dtype == torch.bfloat16 and not module.is_causal
            reached.append(module.layer_idx)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_stand_in", flash)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "flash_stand_in", sdpa_mask)
    model = tiny.build().to(dtype)
    batch = tiny.inputs(*BATCHES[rows])
    expected = tiny.logits(model, batch)
    model.model.language_model.config._attn_implementation = "flash_stand_in"
    torch.testing.assert_close(tiny.logits(model, batch), expected)
    # Several images need a mask, because each text attends to those before it: then sdpa runs.
    assert reached == ([1, 2] if rows == "one image" and dtype == torch.bfloat16 else [])


def test_float32_branch_in_a_bfloat16_model():
    model = tiny.build().to(torch.bfloat16)
    for block in branches(model):
        block.float()
    batch = tiny.inputs(*BATCHES["mixed rows"])
    on = tiny.logits(model, batch)
    assert on.dtype == torch.bfloat16
    real = batch["attention_mask"].bool()
    float32 = tiny.logits(tiny.build(), batch)
    assert torch.nn.functional.cosine_similarity(on.float(), float32, dim=-1)[real].min() > 0.95


# ---------------------------------------------------------------------------------------------- recording


# The stock Qwen3VLModel of older transformers returns a class without a field for it.
OLD_OUTPUT_CLASS = hasattr(modeling_qwen3_vl, "Qwen3VLModelOutputWithPast")


def decoder_inputs(model, batch) -> dict:
    """The arguments with which `model.model` calls the decoder."""
    calls = []
    decoder = model.model.language_model
    hook = decoder.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    tiny.logits(model, batch)
    hook.remove()
    return calls[0]


def assert_attention_weights(recorded, batch):
    """Two branches; the first row has two images, the second none."""
    length = batch["input_ids"].shape[1]
    visual = batch["mm_token_type_ids"][0].nonzero()[:, 0]
    assert len(visual) == 12
    assert len(recorded) == 2
    assert not torch.equal(recorded[0], recorded[1])
    for weights in recorded:
        assert weights.shape == (2, 2, length, 12)
        assert (weights[1] == 0).all(), "a row without an image"
        for position in range(length):
            before = (visual < position) & (position not in visual)
            row = weights[0, :, position]
            assert (row[:, ~before] == 0).all()
            assert (row[:, before] > 0).all()
            torch.testing.assert_close(row.sum(-1), torch.full((2,), float(before.any())))


RECORDED = [[text(3), image(), text(4, 1), image(4, 8, 1), text(5, 2)], [text(6, 3)]]


def test_attention_weights_are_recorded():
    model = tiny.build(attn_implementation="eager")
    batch = tiny.inputs(*RECORDED)
    kwargs = decoder_inputs(model, batch)
    with torch.no_grad():
        recorded = model.model.language_model(**kwargs, output_pvm_attentions=True)
        plain = model.model.language_model(**kwargs)
    assert "pvm_attentions" not in plain
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(recorded.last_hidden_state[real], plain.last_hidden_state[real], atol=1e-5, rtol=1e-5)
    assert_attention_weights(recorded.pvm_attentions, batch)


@pytest.mark.skipif(OLD_OUTPUT_CLASS, reason="only the decoder records in this version of transformers")
def test_attention_weights_are_recorded_by_the_whole_backbone():
    batch = tiny.inputs(*RECORDED)
    with torch.no_grad():
        recorded = tiny.build(attn_implementation="eager").model(**batch, output_pvm_attentions=True)
    assert_attention_weights(recorded.pvm_attentions, batch)


def test_recording_needs_eager_attention(model):
    with pytest.raises(ValueError, match=r"output_pvm_attentions.*eager.*sdpa.*set_attn_implementation\('eager'\)"):
        model.model(**tiny.inputs(*BATCHES["one image"]), output_pvm_attentions=True)


def test_recording_is_refused_where_it_would_be_lost(model):
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"Call the backbone"):
        model(**tiny.inputs(*BATCHES["one image"]), output_pvm_attentions=True)


def test_stock_recordings_are_untouched(model):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**tiny.inputs(*BATCHES["one image"]), output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 4 and len(output.hidden_states) == 5
    assert output.attentions[1].shape == (1, 4, 17, 17)


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("rows", ["several images", "mixed rows", "text only"])
@pytest.mark.parametrize("mixed_precision", [False, True], ids=["float32", "bfloat16 backbone"])
def test_gradient_checkpointing_with_a_frozen_backbone(rows, mixed_precision):
    model = tiny.build()
    if mixed_precision:
        model.to(torch.bfloat16)
        for block in branches(model):
            block.float()
    train_branches_only(model)
    batch = tiny.inputs(*BATCHES[rows])
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable()
    assert_same_gradients(gradients(model, batch), plain)
    assert all((gradient == 0).all() for gradient in plain.values()) == (rows == "text only")


def test_reentrant_gradient_checkpointing_is_refused(model):
    with pytest.raises(ValueError, match="Leave `use_reentrant` out"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


def test_gradient_checkpointing_with_everything_trainable():
    model = tiny.build().train()
    batch = tiny.inputs(*BATCHES["mixed rows"])
    plain = gradients(model, batch, names="")
    model.gradient_checkpointing_enable()
    assert_same_gradients(gradients(model, batch, names=""), plain, atol=1e-5)
    assert any(gradient.abs().max() > 1e-4 for name, gradient in plain.items() if ".visual." in name)


def test_vision_tower_learns_through_the_branch():
    model = tiny.build().train()
    injected = []
    (block, _) = branches(model)
    # Queries are detached, so that gradients come through keys and values only.
    block.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
    block.register_forward_hook(lambda module, args, output: injected.append(output))
    model(**tiny.inputs(*BATCHES["one image"]))
    (injected[0] * torch.randn_like(injected[0])).sum().backward()
    assert model.model.visual.merger.linear_fc2.weight.grad.abs().max() > 1e-3
    assert model.model.visual.patch_embed.proj.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("rows", ["several images", "text only"])
def test_training_under_autocast(rows):
    model = train_branches_only(tiny.build())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(model, tiny.inputs(*BATCHES[rows]))
    value.backward()
    for name, parameter in pvm_parameters(model).items():
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any() == (rows != "text only"), name


def test_training_on_text_only_gives_every_branch_parameter_a_zero_gradient():
    model = train_branches_only(tiny.build(tiny.pvm_config(text={"attention_bias": True})))
    batch = tiny.inputs([text(6)], [text(9, 1)])
    for name, gradient in gradients(model, batch).items():
        assert (gradient == 0).all(), name
    assert all(parameter.grad is not None for parameter in pvm_parameters(model).values())
    assert torch.equal(tiny.logits(model, batch), tiny.logits(model.eval(), batch)), "the extra query must not matter"


def test_frozen_layers_below_the_first_branch_are_not_differentiated():
    model = train_branches_only(tiny.build())
    streams = {}
    for index, layer in enumerate(model.model.language_model.layers):
        layer.register_forward_hook(lambda module, args, output, index=index: streams.update({index: output}))
    loss(model, tiny.inputs(*BATCHES["one image"]))
    assert [streams[index].requires_grad for index in range(4)] == [False, True, True, True]


@pytest.mark.parametrize("trained_below", [False, True])
def test_frozen_layers_below_the_first_branch_are_not_run_again(trained_below):
    """With checkpointing, layers run twice from the first trained one on, and those below it once."""
    model = train_branches_only(tiny.build(pvm_layers=[2, 3]))
    layers = model.model.language_model.layers
    if trained_below:  # as LoRA may
        layers[1].mlp.requires_grad_(True)
    model.gradient_checkpointing_enable()
    runs = [0] * 4
    for index, layer in enumerate(layers):
        layer.input_layernorm.register_forward_hook(
            lambda module, args, output, index=index: runs.__setitem__(index, runs[index] + 1)
        )
    batch = tiny.inputs(*BATCHES["one image"])
    loss(model, batch).backward()
    assert runs[2:] == [2, 2]
    if trained_below:
        assert layers[1].mlp.up_proj.weight.grad.abs().max() > 0
    else:
        assert runs[:2] == [1, 1]


# ---------------------------------------------------------------------------------------------- saving and loading


def test_save_and_load_bit_for_bit(model, tmp_path):
    model.save_pretrained(tmp_path)
    again, info = Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name in expected:
        assert torch.equal(state[name], expected[name]), name
    base = Qwen3VLPVMModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(base.state_dict().values(), model.model.state_dict().values()))


def test_a_variant_of_the_weights(model, tmp_path):
    model.save_pretrained(tmp_path / "one", variant="bf16")
    model.save_pretrained(tmp_path / "several", variant="bf16", max_shard_size="50KB")
    for name in ("one", "several"):
        again = Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path / name, variant="bf16")
        assert all(torch.equal(weight, again.state_dict()[key]) for key, weight in model.state_dict().items())


def test_layers_on_disk(model, tmp_path):
    model.config.text_config.pvm_training = METADATA  # gates on disk are not checked
    model.save_pretrained(tmp_path / "model")
    decoder = "model.language_model"
    places = {f"{decoder}.layers.{index}": "disk" if index in (1, 2) else "cpu" for index in range(4)}
    for name in ("model.visual", f"{decoder}.embed_tokens", f"{decoder}.norm", f"{decoder}.rotary_emb", "lm_head"):
        places[name] = "cpu"
    again = Qwen3VLPVMForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    ).eval()
    assert all(block.gate_alpha.device.type == "meta" for block in branches(again))
    batch = tiny.inputs(*BATCHES["mixed rows"])
    assert torch.equal(tiny.logits(again, batch), tiny.logits(model, batch))


LOAD_ELSEWHERE = """
import json, sys
import pvm_torchvision
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

folder, inputs, logits = sys.argv[1:4]
names = [type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__]
batch, expected = load_file(inputs), load_file(logits)["logits"]
for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    names.append(type(model).__name__)
    with torch.no_grad():
        if auto is not AutoModel:
            assert torch.equal(model(**batch).logits, expected)
    model.save_pretrained(folder + "-again")
    again = auto.from_pretrained(folder + "-again", trust_remote_code=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
print(json.dumps(names))
"""


def test_loads_through_auto_classes_from_a_folder_alone(model, tmp_path):
    """In a new process outside of this checkout."""
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    elsewhere.mkdir()
    model.save_pretrained(folder)
    assert {path.name for path in folder.glob("*.py")} == {path.name for path in ROOT.glob("*_qwen3vl_pvm.py")}
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors"}
    batch = tiny.inputs(*BATCHES["one image"])
    save_file(batch, tmp_path / "inputs.safetensors")
    save_file({"logits": model(**batch).logits.detach()}, tmp_path / "logits.safetensors")
    # The only file from this checkout: it makes torchvision importable on machines whose wheel does not match.
    fallback = ROOT / "pvm" / "torchvision_fallback.py"
    (elsewhere / "pvm_torchvision.py").write_text(fallback.read_text() + "\nimport_torchvision()\n")
    (elsewhere / "load.py").write_text(LOAD_ELSEWHERE)

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "load.py", folder, tmp_path / "inputs.safetensors", tmp_path / "logits.safetensors"],
        cwd=elsewhere,
        env={**environment, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    classes = ["Qwen3VLPVMConfig", "Qwen3VLPVMModel"] + ["Qwen3VLPVMForConditionalGeneration"] * 2
    assert result.stdout.strip().splitlines()[-1] == str(classes).replace("'", '"')


def test_resize_token_embeddings(model):
    batch = tiny.inputs(*BATCHES["one image"])
    before = tiny.logits(model, batch)
    model.resize_token_embeddings(tiny.VOCAB_SIZE + 8)
    after = tiny.logits(model, batch)
    assert after.shape[-1] == tiny.VOCAB_SIZE + 8
    assert torch.equal(after[..., : tiny.VOCAB_SIZE], before)


def test_tied_embeddings(tmp_path):
    stock = tiny.build_stock(text={"tie_word_embeddings": True}, tie_word_embeddings=True)
    stock.save_pretrained(tmp_path / "stock")
    config = Qwen3VLPVMConfig.from_stock(stock.config, pvm_layers=[1, 2], pvm_hidden_size=32)
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path / "stock", config=config).eval()
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    batch = tiny.inputs(*BATCHES["one image"])
    assert torch.equal(tiny.logits(model, batch), tiny.logits(stock, batch))

    tiny.set_gates(model, 1.0)
    model.save_pretrained(tmp_path / "pvm")
    assert "lm_head.weight" not in load_file(tmp_path / "pvm" / "model.safetensors")
    again = Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path / "pvm").eval()
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
    assert torch.equal(tiny.logits(again, batch), tiny.logits(model, batch))


@pytest.mark.parametrize(
    "use_pvm",
    [[99], [0], [-1], ["1"], [True], {"a": 1}, torch.tensor(False), None, 1, "yes", (layer for layer in [1])],
)
def test_refuses_a_switch_that_is_none(model, use_pvm):
    batch = tiny.inputs(*BATCHES["one image"])
    with pytest.raises(ValueError, match=r"`use_pvm=.*: pass True, False or a list of layers.*of \[1, 2\]"):
        model(**batch, use_pvm=use_pvm)


@pytest.mark.parametrize("name", ["use_pwm", "use_PVM", "pvm_layers", "image_kv_cash", "kv_cache", "output_pvm_attn"])
def test_refuses_an_argument_that_is_misspelt(model, name):
    """In `forward`; `generate` refuses whatever it does not know, as the stock model's."""
    batch = tiny.inputs(*BATCHES["one image"])
    for forward in (model, model.model):
        with pytest.raises(TypeError, match=f"`{name}` is not an argument of the model. Did you mean one of use_pvm"):
            forward(**batch, **{name: False})
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(**batch, **{name: False})


def test_refuses_no_argument_of_transformers(model):
    for name in (*TransformersKwargs.__optional_keys__, "use_cache", "logits_to_keep", "cache", "block_table"):
        refuse_misspelt(name)


def test_refuses_the_config_of_a_stock_model():
    with pytest.raises(ValueError, match=r"without PVM fields.*Qwen3VLPVMConfig.from_stock"):
        Qwen3VLPVMForConditionalGeneration(tiny.stock_config())


def save_with(model, folder, gate: float, metadata: dict | None, with_branches: bool = True):
    tiny.set_gates(model, gate)
    model.config.text_config.pvm_training = metadata
    model.save_pretrained(folder)
    if not with_branches:
        weights = load_file(folder / "model.safetensors")
        kept = {name: tensor for name, tensor in weights.items() if ".pvm_block." not in name}
        assert 0 < len(kept) < len(weights)
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("model_class", [Qwen3VLPVMForConditionalGeneration, Qwen3VLPVMModel])
def test_refuses_a_trained_checkpoint_without_its_branches(model, tmp_path, model_class):
    save_with(model, tmp_path, gate=1.0, metadata=METADATA, with_branches=False)
    with pytest.raises(ValueError, match="lacks 30 weights, e.g. layers.1.pvm_block"):
        model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_class", [Qwen3VLPVMForConditionalGeneration, Qwen3VLPVMModel])
def test_refuses_a_trained_checkpoint_with_all_gates_zero(model, tmp_path, model_class):
    save_with(model, tmp_path, gate=0.0, metadata=METADATA)
    with pytest.raises(ValueError, match=r"branches were trained.*all gates are exactly 0"):
        model_class.from_pretrained(tmp_path)


def test_accepts_a_trained_checkpoint_with_one_gate_open(model, tmp_path):
    save_with(model, tmp_path, gate=0.0, metadata=METADATA)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.language_model.layers.2.pvm_block.gate_alpha"].fill_(-0.25)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path)
    assert [block.gate_alpha.item() for block in branches(again)] == [0.0, -0.25]


def test_refuses_a_checkpoint_without_metadata_and_branches(model, tmp_path):
    save_with(model, tmp_path, gate=0.0, metadata=None, with_branches=False)
    with pytest.raises(ValueError, match="lacks 30 weights, e.g. layers.1.pvm_block"):
        Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path)


def test_accepts_a_checkpoint_without_metadata(model, tmp_path):
    save_with(model, tmp_path, gate=0.0, metadata=None)
    again = Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path)
    assert [block.gate_alpha.item() for block in branches(again)] == [0.0, 0.0]


# ---------------------------------------------------------------------------------------------- embeddings as input


@pytest.mark.parametrize("rows", ["one image", "mixed rows"])
def test_input_embeddings_with_pixels_equal_input_ids(model, rows):
    batch = tiny.inputs(*BATCHES[rows])
    expected = tiny.logits(model, batch)
    position_ids, _ = model.model.get_rope_index(
        **{name: value for name, value in batch.items() if not name.startswith("pixel")}
    )
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    actual = tiny.logits(model, {**batch, "inputs_embeds": embeds, "position_ids": position_ids})
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hint", ["mm_token_type_ids", "image_grid_thw"])
def test_refuses_embeddings_with_the_image_merged_in(model, hint):
    batch = tiny.inputs(*BATCHES["one image"])
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="Pass `pixel_values`"):
        model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **{hint: batch[hint]})


def test_text_as_embeddings_is_accepted(model):
    batch = tiny.inputs(*BATCHES["text only"])
    embeds = model.get_input_embeddings()(batch["input_ids"])
    actual = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(actual, tiny.logits(model, batch))


# ---------------------------------------------------------------------------------------------- peft


def test_lora_together_with_branches(model):
    batch = tiny.inputs(*BATCHES["several images"])
    expected = tiny.logits(model, batch)
    config = peft.LoraConfig(
        r=4,
        target_modules=r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
        modules_to_save=["pvm_block"],
    )
    adapted = peft.get_peft_model(model, config)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(tiny.logits(adapted, batch)[real], expected[real], atol=1e-6, rtol=1e-6)

    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any("lora_A" in name for name in trainable)
    assert sum(name.endswith("gate_alpha") for name in trainable) == 2
    assert all("lora_" in name or ".pvm_block.modules_to_save." in name for name in trainable)

    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    adapted.train()
    for _ in range(2):
        optimizer.zero_grad()
        loss(adapted, batch).backward()
        optimizer.step()
    for name, parameter in adapted.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trainable), name

    adapted.eval()
    trained = tiny.logits(adapted, batch)
    assert (trained - expected)[real].abs().max() > 1e-2
    merged = adapted.merge_and_unload()
    assert type(merged) is Qwen3VLPVMForConditionalGeneration
    assert all(type(layer.pvm_block) is Qwen3VLPVMBlock for layer in merged.model.language_model.layers[1:3])
    torch.testing.assert_close(tiny.logits(merged, batch)[real], trained[real], atol=1e-4, rtol=1e-4)
