"""What `python -m pvm inspect` says about checkpoints of every kind, and about broken ones."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file

import tiny
from adapter_qwen3vl_pvm import ADAPTER_WEIGHTS_NAME
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration
from pvm.checkpoints import convert
from pvm.checkpoints.inspect import inspect, main, show
from pvm.errors import UserError
from variants_qwen3vl_pvm import BLOCKS


REFERENCE = Path(__file__).parent / "reference_case"
RELEASE = Path(__file__).parent / "release_0.1.0"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    tiny.build_stock().save_pretrained(folder / "base")
    model = tiny.build(gate=0.5)
    model.config.base_model_name_or_path = str(folder / "base")
    model.config.text_config.pvm_training = {"method": "pvm", "step": 10}
    model.save_pretrained(folder / "adapter", adapter_only=True)
    shutil.copy(RELEASE / "adapter" / "training.json", folder / "adapter")
    return folder / "adapter"


@pytest.fixture
def copy(adapter, tmp_path) -> Path:
    shutil.copytree(adapter, tmp_path / "copy")
    return tmp_path / "copy"


def edit(folder: Path, change) -> None:
    weights = load_file(folder / ADAPTER_WEIGHTS_NAME)
    change(weights)
    save_file(weights, folder / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})


def test_an_adapter(adapter):
    found = inspect(str(adapter))
    assert (found.kind, found.base) == ("PVM, adapter checkpoint", str(adapter.parent / "base"))
    assert (found.layers, found.width, found.causal) == ([1, 2], 32, True)
    weights = load_file(adapter / ADAPTER_WEIGHTS_NAME)
    assert found.branches["parameters"] == sum(weight.numel() for weight in weights.values()) > 20_000
    assert found.gates == {1: 0.5, 2: 0.5}
    assert found.trained["step"] == found.record["step"] == 10 and not found.problems
    sha256 = subprocess.run(["sha256sum", adapter / ADAPTER_WEIGHTS_NAME], capture_output=True, text=True).stdout
    assert found.files[ADAPTER_WEIGHTS_NAME]["sha256"] == sha256.split()[0]


def test_the_same_branches_have_the_same_hash_in_every_form(adapter, tmp_path):
    convert.main([str(adapter), str(tmp_path / "whole"), "--to", "whole"])
    whole = inspect(str(tmp_path / "whole"))
    assert whole.kind == "PVM, whole checkpoint" and whole.base is None and not whole.problems
    assert whole.branches == inspect(str(adapter)).branches
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert inspect(str(tmp_path / "shards")).branches == whole.branches


def test_other_kinds(base, tmp_path):
    stock = inspect(str(base))
    assert (stock.kind, stock.block, stock.problems) == ("stock Qwen3-VL", None, [])
    reference = inspect(str(REFERENCE))
    assert reference.kind == "PVM, whole checkpoint of the authors' implementation" and reference.causal is False
    assert [round(gate, 4) for gate in reference.gates.values()] == [0.5358, -0.513] and not reference.problems

    lora = get_peft_model(tiny.build_stock(), LoraConfig(target_modules=["q_proj"]))
    lora.peft_config["default"].base_model_name_or_path = str(base)
    lora.save_pretrained(tmp_path / "lora")
    lora = inspect(str(tmp_path / "lora"))
    assert (lora.kind, lora.base, lora.problems) == ("PEFT adapter", str(base), [])
    both = tmp_path / "both"
    shutil.copytree(RELEASE / "adapter_with_lora", both)
    assert inspect(str(both)).kind == "PVM, adapter checkpoint with LoRA" and not inspect(str(both)).problems
    (both / "lora" / "adapter_model.safetensors").unlink()
    assert inspect(str(both)).problems == ["There is no lora/adapter_model.safetensors."]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_kind_of_branch(tmp_path, block):
    tiny.build(pvm_block=block).save_pretrained(tmp_path / "model")
    found = inspect(str(tmp_path / "model"))
    assert found.kind == "PVM, whole checkpoint" and not found.problems
    name, _, summary = found.block.partition(": ")
    assert name == block and summary.endswith(".") and summary in " ".join(BLOCKS[block].__doc__.split())
    convert.main([str(tmp_path / "model"), str(tmp_path / "again"), "--to", "whole"])
    assert inspect(str(tmp_path / "again")).branches == found.branches


GATE = "model.language_model.layers.2.pvm_block.gate_alpha"
NORM = "model.language_model.layers.2.pvm_block.input_norm.weight"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda weights: weights[GATE].fill_(float("nan")), f"{GATE} is nan"),
        (lambda weights: weights[GATE].fill_(1e9), f"{GATE} is 1000000000.0"),
        (lambda weights: weights.pop(NORM), f"{NORM} is missing."),
        (lambda weights: weights.update({NORM: torch.ones(3)}), f"{NORM} has the shape (3,), and the config expects"),
        (lambda weights: [weights[key].zero_() for key in weights if "gate" in key], "All gates are exactly 0"),
    ],
)
def test_broken_weights(copy, capsys, change, problem):
    edit(copy, change)
    assert any(sentence.startswith(problem) for sentence in inspect(str(copy)).problems)
    with pytest.raises(SystemExit) as status:
        main([str(copy)])
    assert status.value.code == 1 and "Problem: " in capsys.readouterr().out


def test_broken_folders(copy, tmp_path):
    (copy / "modeling_qwen3vl_pvm.py").unlink()
    (copy / "pytorch_model.bin").touch()
    config = json.loads((copy / "config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (copy / "config.json").write_text(json.dumps(config))
    assert inspect(str(copy)).problems == [
        f"The base is the folder {tmp_path / 'gone'}, which does not exist.",
        "There is no modeling_qwen3vl_pvm.py: trust_remote_code cannot load the checkpoint.",
        "pytorch_model.bin is a pickle, which is never loaded: only safetensors are.",
    ]
    (copy / ADAPTER_WEIGHTS_NAME).unlink()
    assert "There is no model.pvm.safetensors." in inspect(str(copy)).problems
    with pytest.raises(UserError, match="is not a folder"):
        inspect(str(tmp_path / "nothing"))


def test_code(copy):
    (copy / "cache_qwen3vl_pvm.py").unlink()
    (problem,) = inspect(str(copy)).problems
    assert problem.startswith("There is no cache_qwen3vl_pvm.py"), "which other files import"
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "other/repo--evil.Config"}
    (copy / "config.json").write_text(json.dumps(config))
    missing, foreign = inspect(str(copy)).problems
    assert "no `auto_map` for AutoModelForImageTextToText" in missing
    assert foreign == "The code is that of another repository: other/repo--evil.Config."


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", b"x" * 5000, None])
def test_damaged_files(copy, content):
    file = copy / ADAPTER_WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-2000] if content is None else content)
    assert any(part in inspect(str(copy)).problems[0] for part in ("is not a safetensors file", "is damaged"))


def test_a_whole_checkpoint_without_a_weight_of_its_backbone(tmp_path):
    tiny.build().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.visual.pos_embed.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert inspect(str(tmp_path)).problems == [
        "1 weights of the backbone are missing, e.g. model.visual.pos_embed.weight."
    ]


def test_fresh_branches(tmp_path):
    tiny.build(gate=0.0).save_pretrained(tmp_path)
    console = Console(record=True, width=200)
    found = inspect(str(tmp_path))
    show(found, console)
    assert not found.problems and "not recorded; all gates are 0" in console.export_text()
