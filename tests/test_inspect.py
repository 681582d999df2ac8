"""What `python -m pvm inspect` says of checkpoints of every kind, and of broken ones."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import tiny
from configuration_qwen3vl_pvm import ADAPTER_WEIGHTS_NAME
from hub_server import serve
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration
from pvm.checkpoints import convert
from pvm.checkpoints.inspect import inspect, main, show
from pvm.errors import UserError
from training import PVM, ROOT, run


REFERENCE = Path(__file__).parent / "reference_case"


@pytest.fixture(scope="module")
def adapter(base, conversations, tmp_path_factory) -> Path:
    return run(base, conversations, tmp_path_factory.mktemp("inspect") / "run", *PVM, "--gate_learning_rate", "0.05")


@pytest.fixture
def copy(adapter, tmp_path) -> Path:
    shutil.copytree(adapter, tmp_path / "copy")
    return tmp_path / "copy"


def edit(folder: Path, change) -> None:
    weights = load_file(folder / ADAPTER_WEIGHTS_NAME)
    change(weights)
    save_file(weights, folder / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})


def test_an_adapter(adapter, base):
    found = inspect(str(adapter))
    assert (found.kind, found.base, found.layers, found.width) == ("PVM, an adapter", str(base), [1, 2, 3], 32)
    weights = load_file(adapter / ADAPTER_WEIGHTS_NAME)
    assert found.branches["parameters"] == sum(weight.numel() for weight in weights.values()) == 77187
    assert found.gates == {
        k: weights[f"model.language_model.layers.{k}.pvm_block.gate_alpha"].item() for k in (1, 2, 3)
    }
    assert found.trained["step"] == found.record["step"] == 4 and found.causal and not found.problems
    sha256 = subprocess.run(["sha256sum", adapter / ADAPTER_WEIGHTS_NAME], capture_output=True, text=True).stdout
    assert found.files[ADAPTER_WEIGHTS_NAME]["sha256"] == sha256.split()[0]


def test_the_same_branches_have_the_same_hash_in_every_form(adapter, tmp_path):
    convert.main([str(adapter), str(tmp_path / "whole"), "--to", "full"])
    whole = inspect(str(tmp_path / "whole"))
    assert whole.kind == "PVM, whole" and whole.base is None and not whole.problems
    assert whole.branches == inspect(str(adapter)).branches
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert inspect(str(tmp_path / "shards")).branches == whole.branches


def test_other_kinds(base, conversations, tmp_path):
    assert inspect(str(base)).kind == "stock Qwen3-VL"
    reference = inspect(str(REFERENCE))
    assert reference.kind == "PVM, whole, of the authors' implementation" and reference.causal is False
    assert [round(gate, 4) for gate in reference.gates.values()] == [0.5358, -0.513] and not reference.problems
    lora = inspect(str(run(base, conversations, tmp_path / "lora", "--method", "lora")))
    assert (lora.kind, lora.base) == ("PEFT adapter", str(base)) and not lora.problems
    both = run(base, conversations, tmp_path / "both", *PVM, "--method", "pvm+lora")
    assert inspect(str(both)).kind == "PVM, an adapter with LoRA" and not inspect(str(both)).problems
    (both / "lora/adapter_model.safetensors").unlink()
    assert inspect(str(both)).problems == ["There is no lora/adapter_model.safetensors."]
    mlp = inspect(str(run(base, conversations, tmp_path / "mlp", *PVM, "--method", "mlp")))
    assert mlp.kind == "parallel MLP, a control, an adapter" and not mlp.problems


GATE = "model.language_model.layers.2.pvm_block.gate_alpha"
NORM = "model.language_model.layers.2.pvm_block.input_norm.weight"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda weights: weights[GATE].fill_(float("nan")), f"{GATE} is nan"),
        (lambda weights: weights[GATE].fill_(1e9), f"{GATE} is 1000000000.0"),
        (lambda weights: weights.pop(NORM), f"{NORM} is missing."),
        (lambda weights: weights.update({NORM: torch.ones(3)}), f"{NORM} has the shape (3,), and the config wants"),
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
    (copy / "config.json").write_text(
        json.dumps({**config, "auto_map": {}, "base_model_name_or_path": str(tmp_path / "gone")})
    )
    problems = " ".join(inspect(str(copy)).problems)
    for part in ("no modeling_qwen3vl_pvm.py", "pytorch_model.bin is a pickle", "no `auto_map`", "which is not there"):
        assert part in problems
    (copy / ADAPTER_WEIGHTS_NAME).unlink()
    assert any("There is no model.pvm.safetensors" in problem for problem in inspect(str(copy)).problems)
    with pytest.raises(UserError, match="is no folder"):
        inspect(str(tmp_path / "nothing"))


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", b"x" * 5000, None])
def test_damaged_files(copy, content):
    file = copy / ADAPTER_WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-2000] if content is None else content)
    assert any(part in inspect(str(copy)).problems[0] for part in ("is no safetensors file", "it is damaged"))


def test_a_whole_checkpoint_without_a_weight_of_its_backbone(tmp_path):
    tiny.build().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.visual.pos_embed.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert inspect(str(tmp_path)).problems == [
        "It lacks 1 weights of its backbone, e.g. model.visual.pos_embed.weight."
    ]


def test_code_of_another_repository(copy):
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "other/repo--evil.Config"
    (copy / "config.json").write_text(json.dumps(config))
    assert "Its code is that of another repository: other/repo--evil.Config." in inspect(str(copy)).problems


def test_fresh_branches(tmp_path):
    tiny.build(gate=0.0).save_pretrained(tmp_path)
    console = Console(record=True, width=200)
    found = inspect(str(tmp_path))
    show(found, console)
    assert not found.problems and "not marked as trained; all gates are 0" in console.export_text()


def test_on_the_hub(base, conversations, tmp_path):
    """The same is said of it as of the folder, and the weights of a whole checkpoint are not downloaded."""
    whole = tmp_path / "whole"
    convert.main([str(run(base, conversations, tmp_path / "run", *PVM)), str(whole), "--to", "full"])
    with serve(tmp_path / "hub") as hub:
        environment = {**hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        push = "from huggingface_hub import HfApi; import sys; HfApi().create_repo('me/pvm'); "
        push += "HfApi().upload_folder(repo_id='me/pvm', folder_path=sys.argv[1])"
        subprocess.run([sys.executable, "-c", push, str(whole)], env=environment, check=True, capture_output=True)
        command = [sys.executable, "-m", "pvm.checkpoints.inspect", "me/pvm", "--json"]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        downloads = [request for request in hub.requests if "/object/" in request]
    remote, local = json.loads(result.stdout), inspect(str(whole))
    assert remote["branches"] == local.branches and remote["kind"] == local.kind
    assert remote["gates"] == {str(layer): gate for layer, gate in local.gates.items()}
    assert remote["files"]["model.safetensors"] == local.files["model.safetensors"]
    assert downloads and {request.split()[-1] for request in downloads} == {"206"}, "only parts of the file"
