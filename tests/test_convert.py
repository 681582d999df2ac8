"""Every form of a checkpoint turned into the others."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

import tiny
from adapter_qwen3vl_pvm import ADAPTER_WEIGHTS_NAME
from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration
from pvm import __main__ as commands
from pvm.checkpoints import convert
from pvm.checkpoints.inspect import inspect
from pvm.errors import UserError


REFERENCE = Path(__file__).parent / "reference_case"
RELEASE = Path(__file__).parent / "release_0.1.0"
BATCH = tiny.inputs(*tiny.BATCHES["mixed rows"])
load = Qwen3VLPVMForConditionalGeneration.from_pretrained


@pytest.fixture
def stock(tmp_path) -> Path:
    tiny.build_stock().save_pretrained(tmp_path / "stock", max_shard_size="50KB")
    return tmp_path / "stock"


@pytest.fixture
def adapter(stock, tmp_path) -> Path:
    config = Qwen3VLPVMConfig.from_stock(tiny.stock_config(), pvm_layers=[1, 2], pvm_hidden_size=32)
    model = load(stock, config=config)
    tiny.set_gates(model, 0.5)
    model.config.base_model_name_or_path = str(stock)
    model.config.text_config.pvm_training = {"method": "pvm", "step": 7}
    model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    return tmp_path / "adapter"


def same_weights(first: Path, second: Path) -> bool:
    first, second = load_file(first), load_file(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_whole_and_back(stock, adapter, tmp_path, capsys):
    convert.main([str(adapter), str(tmp_path / "whole"), "--to", "whole"])
    assert torch.equal(tiny.logits(load(tmp_path / "whole"), BATCH), tiny.logits(load(adapter), BATCH))
    assert not (tmp_path / "whole" / ADAPTER_WEIGHTS_NAME).exists() and (tmp_path / "whole/README.md").exists()
    assert "has no processor" in capsys.readouterr().out

    with pytest.raises(UserError, match="does not name its base"):
        convert.main([str(tmp_path / "whole"), str(tmp_path / "back"), "--to", "adapter"])
    convert.main([str(tmp_path / "whole"), str(tmp_path / "back"), "--to", "adapter", "--base", str(stock)])
    assert same_weights(tmp_path / "back" / ADAPTER_WEIGHTS_NAME, adapter / ADAPTER_WEIGHTS_NAME)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", adapter))
    assert ours == theirs


@pytest.mark.parametrize("tied", [False, True])
def test_the_base_keeps_its_dtype(tmp_path, tied):
    """After a training in float32 on a base in bfloat16: the same model, in half of the bytes."""
    base, adapter, whole = tmp_path / "base", tmp_path / "adapter", tmp_path / "whole"
    config = tiny.stock_config()
    config.tie_word_embeddings = tied
    Qwen3VLForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(base)
    model = load(base, dtype="float32")
    tiny.set_gates(model, 0.3)  # not a number of bfloat16
    model.config.base_model_name_or_path = str(base)
    model.save_pretrained(adapter, adapter_only=True)
    convert.main([str(adapter), str(whole), "--to", "whole"])
    weights = load_file(whole / "model.safetensors")
    assert ("lm_head.weight" in weights) != tied
    for name, weight in weights.items():
        assert weight.dtype == (torch.float32 if ".pvm_block." in name else torch.bfloat16), name
    assert torch.equal(tiny.logits(load(whole), BATCH), tiny.logits(load(adapter), BATCH))


def test_a_changed_backbone_makes_no_adapter(stock, adapter, tmp_path):
    model = load(adapter)
    with torch.no_grad():
        model.model.visual.pos_embed.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match="model.visual.pos_embed.weight differs from that of"):
        convert.main([str(tmp_path / "whole"), str(tmp_path / "back"), "--to", "adapter", "--base", str(stock)])
    assert not (tmp_path / "back").exists()


def test_another_base_makes_no_adapter(adapter, tmp_path):
    load(adapter).save_pretrained(tmp_path / "whole")
    tiny.build_stock({"num_hidden_layers": 3}).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="differs from that of"):
        convert.main(
            [str(tmp_path / "whole"), str(tmp_path / "back"), "--to", "adapter", "--base", str(tmp_path / "other")]
        )


def test_the_base_of_an_adapter_is_a_stock_model(adapter, stock, tmp_path):
    load(adapter).save_pretrained(tmp_path / "whole")
    for base in ("whole", "adapter"):
        flags = ("--to", "adapter", "--base", str(tmp_path / base))
        with pytest.raises(UserError, match="is of the kind pvm, and the base of an adapter must be a stock model"):
            convert.main([str(tmp_path / "whole"), str(tmp_path / "back"), *flags])
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_is_merged(tmp_path, dtype):
    """In float32, and rounded once."""
    base, trained = tmp_path / "base", tmp_path / "trained"
    Qwen3VLForConditionalGeneration.from_pretrained(RELEASE / "base", dtype=dtype).save_pretrained(base)
    shutil.copytree(RELEASE / "adapter_with_lora", trained)
    config = json.loads((trained / "config.json").read_text())
    config |= {"base_model_name_or_path": str(base), "dtype": dtype}
    (trained / "config.json").write_text(json.dumps(config))
    convert.main([str(trained), str(tmp_path / "whole"), "--to", "whole"])
    whole = load(tmp_path / "whole")
    assert str(whole.dtype) == f"torch.{dtype}" and whole.config.peft_adapter is None
    exact = load(trained, dtype="float32")  # LoRA next to the weights
    merged, expected = (tiny.logits(model, BATCH) for model in (load(tmp_path / "whole", dtype="float32"), exact))
    without = tiny.logits(load(RELEASE / "adapter", dtype="float32", base_model_name_or_path=str(base)), BATCH)
    difference, effect = (merged - expected).abs().max(), (without - expected).abs().max()
    assert difference < (1e-4 if dtype == "float32" else 0.3) < effect
    if dtype == "bfloat16":
        name = "model.language_model.layers.1.mlp.up_proj"
        layer = exact.get_submodule(name)
        layer.merge()
        assert torch.equal(whole.get_submodule(name).weight, layer.base_layer.weight.to(torch.bfloat16))
    assert inspect(str(tmp_path / "whole")).problems == []


def test_the_reference_both_ways(tmp_path):
    """The authors' checkpoint, ours made of it, and theirs made of ours."""
    convert.main([str(REFERENCE), str(tmp_path / "ours"), "--to", "whole"])
    convert.main([str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "reference"])
    assert same_weights(tmp_path / "theirs/model.safetensors", REFERENCE / "model.safetensors")
    theirs, recorded = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "theirs", REFERENCE))
    del recorded["transformers_version"]
    for part, expected in (
        (theirs, recorded),
        (theirs["text_config"], recorded["text_config"]),
        (theirs["vision_config"], recorded["vision_config"]),
    ):
        assert {
            key: part[key] for key in expected if not isinstance(expected[key], dict) or key == "rope_scaling"
        } == {key: value for key, value in expected.items() if not isinstance(value, dict) or key == "rope_scaling"}
    assert not list((tmp_path / "theirs").glob("*.py"))

    inputs = load_file(REFERENCE / "a_one_image.inputs.safetensors")
    expected = load_file(REFERENCE / "a_one_image.logits.safetensors")
    for folder in ("ours", "theirs"):
        model = load(tmp_path / folder)
        assert model.config.text_config.pvm_causal is False
        batch = {**inputs, "mm_token_type_ids": (inputs["input_ids"] == model.config.image_token_id).int()}
        with torch.no_grad():
            actual = {"on": model(**batch).logits, "off": model(**batch, use_pvm=False).logits}
        torch.testing.assert_close(actual["on"], expected["logits"], atol=1e-5, rtol=0)
        torch.testing.assert_close(actual["off"], expected["logits_gate_zero"], atol=1e-5, rtol=0)


def test_a_causal_model_is_not_quite_the_reference_s(adapter, tmp_path, capsys):
    convert.main([str(adapter), str(tmp_path / "theirs"), "--to", "reference"])
    assert "The results differ wherever text comes before an image" in capsys.readouterr().out
    theirs, ours = load(tmp_path / "theirs"), load(adapter)
    assert not torch.equal(tiny.logits(theirs, BATCH), tiny.logits(ours, BATCH))
    theirs.config.text_config.pvm_causal = True
    assert torch.equal(tiny.logits(theirs, BATCH), tiny.logits(ours, BATCH))


def test_an_adapter_of_the_reference(tmp_path):
    """Its backbone as a stock checkpoint is the base."""
    weights = load_file(REFERENCE / "model.safetensors")
    (tmp_path / "base").mkdir()
    kept = {name: weight for name, weight in weights.items() if ".pvm_block." not in name}
    save_file(kept, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    config = json.loads((REFERENCE / "config.json").read_text())
    config["architectures"] = ["Qwen3VLForConditionalGeneration"]
    for key in ("pvm_layers", "pvm_hidden_size"):
        del config["text_config"][key]
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    convert.main([str(REFERENCE), str(tmp_path / "out"), "--to", "adapter", "--base", str(tmp_path / "base")])
    loaded = load(tmp_path / "out")
    assert loaded.config.text_config.pvm_causal is False
    state = loaded.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())


def test_what_is_refused(adapter, base, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    with pytest.raises(UserError, match="is not empty"):
        convert.main([str(adapter), str(tmp_path / "full"), "--to", "whole"])
    with pytest.raises(UserError, match="is of the kind stock"):
        convert.main([str(base), str(tmp_path / "new"), "--to", "whole"])
    tiny.build(pvm_block="token_gate").save_pretrained(tmp_path / "variant")
    with pytest.raises(UserError, match="branches of the kind token_gate"):
        convert.main([str(tmp_path / "variant"), str(tmp_path / "new"), "--to", "reference"])
    assert not (tmp_path / "new").exists()


def test_an_incomplete_checkpoint_is_not_made_whole(adapter, tmp_path):
    load(adapter).save_pretrained(tmp_path / "part")
    weights = load_file(tmp_path / "part/model.safetensors")
    del weights["model.visual.pos_embed.weight"]
    save_file(weights, tmp_path / "part/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights, e.g. model.visual.pos_embed.weight"):
        convert.main([str(tmp_path / "part"), str(tmp_path / "whole"), "--to", "whole"])


def test_an_interrupted_conversion_leaves_nothing(adapter, tmp_path, monkeypatch):
    def full_disk(*args):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(convert, "write_card", full_disk)
        with pytest.raises(OSError, match="No space left"):
            convert.main([str(adapter), str(tmp_path / "whole"), "--to", "whole"])
    assert not (tmp_path / "whole").exists()
    convert.main([str(adapter), str(tmp_path / "whole"), "--to", "whole"])
    assert (tmp_path / "whole/model.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "stock", "whole"}


def test_as_a_command(adapter, monkeypatch, capsys):
    """Errors end as one sentence."""
    monkeypatch.setattr(sys, "argv", ["pvm", "convert", str(adapter), str(adapter), "--to", "whole"])
    with pytest.raises(SystemExit, match="2"):
        commands.main()
    assert capsys.readouterr().err.startswith(f"pvm convert: error: {adapter} is not empty")
    commands.main([])
    help_text = capsys.readouterr().out
    assert all(f"\n  {command} " in help_text for command in commands.COMMANDS)
