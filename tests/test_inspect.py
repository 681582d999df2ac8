"""What `python -m pvm inspect` says about checkpoints of every kind, and about broken ones."""

import json
import os
import shutil
import subprocess
import time
from io import StringIO
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from adapter_qwen3vl_pvm import ADAPTER_WEIGHTS_NAME, AUTO_MAP
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration
from pvm.checkpoints import convert
from pvm.checkpoints.inspect import inspect, main, show
from pvm.checkpoints.stored import Files
from pvm.errors import UserError
from pvm.terminal import Terminal
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
    with pytest.raises(UserError, match="^There is no folder"):
        inspect(str(tmp_path / "nothing"))


def test_code_of_this_installation(copy):
    found = inspect(str(copy))
    assert set(found.code.values()) == {"this installation"} and not found.problems
    assert sorted(found.code) == sorted(file.name for file in copy.glob("*.py"))
    (copy / "cache_qwen3vl_pvm.py").unlink()
    (problem,) = inspect(str(copy)).problems
    assert problem.startswith("There is no cache_qwen3vl_pvm.py"), "which other files import"


EVIL = "import os"


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"config.json": {"auto_map": {"AutoModel": "evil.Model"}}, "evil.py": EVIL}, "evil.py, which"),
        ({"config.json": {"auto_map": {"AutoModel": "sub/evil.Model"}}, "sub/evil.py": EVIL}, "sub/evil.py, which"),
        ({"processor_config.json": {"auto_map": {"AutoProcessor": "evil.P"}}, "evil.py": EVIL}, "evil.py, which"),
        ({"tokenizer_config.json": {"auto_map": [None, "evil.T"]}, "evil.py": EVIL}, "evil.py, which"),
        ({"preprocessor_config.json": {"x": {"auto_map": {"A": "evil.P"}}}, "evil.py": EVIL}, "evil.py, which"),
        ({"config.json": {"custom_pipelines": {"x": {"impl": "evil.P"}}}, "evil.py": EVIL}, "evil.py, which"),
        ({"custom_generate/generate.py": EVIL}, "custom_generate/generate.py, which"),
        ({"variants_qwen3vl_pvm.py": "from .evil import x", "evil.py": EVIL}, "evil.py, which"),
        ({"rope_qwen3vl_pvm.py": "\n"}, "rope_qwen3vl_pvm.py, which"),
        (
            {"config.json": {"auto_map": {"AutoModel": "../evil.Evil"}}},
            "code outside of this checkpoint: ../evil.Evil",
        ),
        ({"config.json": {"auto_map": {"AutoModel": "/evil.Evil"}}}, "code outside of this checkpoint: /evil"),
        ({"tokenizer_config.json": {"auto_map": {"A": "me/x--evil.Evil"}}}, "outside of this checkpoint: me/x--evil"),
    ],
)
def test_foreign_code(copy, files, problem):
    """Whatever `trust_remote_code` would run and is not a file of a release."""
    for name, content in files.items():
        file = copy / name
        file.parent.mkdir(exist_ok=True)
        if name == "config.json":
            content = {**json.loads(file.read_text()), **content}
            content["auto_map"] = {**AUTO_MAP, **content.get("auto_map", {})}
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    found = inspect(str(copy))
    assert "unknown" in found.code.values() and any(problem in sentence for sentence in found.problems)


def test_code_that_nothing_runs(copy):
    (copy / "plot.py").write_text(EVIL)
    assert not inspect(str(copy)).problems


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", b"x" * 5000, None])
def test_damaged_weights(copy, content):
    file = copy / ADAPTER_WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-2000] if content is None else content)
    (problem,) = inspect(str(copy)).problems
    assert problem.startswith(f"{ADAPTER_WEIGHTS_NAME} is damaged: ") and problem.endswith("Get it again.")


def write(content: str | bytes | None, name: str = "config.json"):
    """A file's content; a directory for `None`."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def pipe(name: str):
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def huge(name: str):
    """A file of 1 TB that takes no space."""

    def change(folder: Path) -> None:
        os.truncate(folder / name, 2**40)

    return change


def config(**fields):
    """Fields of config.json; text fields with a prefix."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        for key, value in fields.items():
            (content["text_config"] if key.startswith("text__") else content)[key.removeprefix("text__")] = value
        (folder / "config.json").write_text(json.dumps(content))

    return change


DAMAGE = [
    *((write(content), "is not valid JSON") for content in ("", "{", b"\xff\xfe{}", "[" * 10**5, b"\x00" * 100)),
    *(
        (write(content), "does not hold a JSON object")
        for content in ("null", "[]", "1", '{"a":' * 50 + "1" + "}" * 50)
    ),
    (write("{}"), "has the model type None"),
    (write(None), "has no config.json"),
    (pipe("config.json"), "has no config.json"),
    (config(text_config=None), "has no `text_config`"),
    (config(text_config=[]), "has no `text_config`"),
    (config(text__head_dim=0), "does not describe a PVM model: ZeroDivisionError"),
    (config(text__num_key_value_heads=None), "has the shape (16, 32), and the config expects (32, 32)"),
    (config(text__pvm_layers="1"), "does not describe a PVM model: Field 'pvm_layers'"),
    (config(text__pvm_layers=[9]), "does not describe a PVM model: `pvm_layers=[9]` must name"),
    (config(text__pvm_block="../x"), "does not know branches of the kind '../x'"),
    (config(vision_config="x"), "does not describe a PVM model"),
    (config(peft_adapter="../outside"), "`peft_adapter=../outside` must be the name of a subfolder"),
    (config(peft_adapter="/outside"), "`peft_adapter=/outside` must be the name of a subfolder"),
    (config(base_model_name_or_path=["x"]), "does not describe a PVM model"),
    (config(auto_map=7), "config.json: "),
    (write("[1]", "training.json"), "training.json does not hold a JSON object"),
    (write(None, ADAPTER_WEIGHTS_NAME), "There is no model.pvm.safetensors"),
    (pipe(ADAPTER_WEIGHTS_NAME), "There is no model.pvm.safetensors"),
    (pipe("modeling_qwen3vl_pvm.py"), "There is no modeling_qwen3vl_pvm.py"),
    (pipe("generation_config.json"), "generation_config.json is neither a file nor a folder"),
    (write(b"\xff", "rope_qwen3vl_pvm.py"), "rope_qwen3vl_pvm.py: 'utf-8' codec"),
    (write("x", "adapter_model.bin"), "adapter_model.bin is a pickle"),
    (write("{}", "adapter_config.json"), "holds a PVM checkpoint and a PEFT adapter"),
    (write("x", "model.safetensors"), "model.safetensors is not loaded: the config names a base"),
]


@pytest.mark.parametrize(("change", "problem"), DAMAGE)
def test_damaged_folders(copy, capsys, change, problem):
    """A sentence says what is wrong, and all else is shown."""
    change(copy)
    with pytest.raises(SystemExit) as status:
        main([str(copy)])
    shown = capsys.readouterr().out
    assert status.value.code == 1 and problem in shown and "Traceback" not in shown
    assert "tokenizer" not in shown and "configuration_qwen3vl_pvm.py" in shown


def test_files_too_large_to_be_what_they_say(copy, monkeypatch):
    monkeypatch.setattr(Files, "sha256", lambda files, name: "0" * 64)  # of a terabyte, it would take an hour
    for name in ("config.json", "training.json", ADAPTER_WEIGHTS_NAME, "modeling_qwen3vl_pvm.py"):
        huge(name)(copy)
    problems = inspect(str(copy)).problems
    assert sum("has more than 16,777,216 bytes" in problem for problem in problems) == 2
    assert any(problem.startswith(f"{ADAPTER_WEIGHTS_NAME} is damaged") for problem in problems)


def test_more_layers_than_models_have(tmp_path):
    tiny.build().save_pretrained(tmp_path)
    config(text__num_hidden_layers=100_000)(tmp_path)
    assert inspect(str(tmp_path)).problems == [
        "config.json describes 100,004 layers, which no model has. Get it again."
    ]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS | st.sampled_from([10**5, "pvm", "\x1b]0;x\x07"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=4), values, max_size=3),
    max_leaves=4,
)


def changed(data, value, depth: int = 0):
    """`value` with one of its parts replaced, or left out."""
    if isinstance(value, dict) and value and (depth == 0 or data.draw(st.booleans())):
        key = data.draw(st.sampled_from(sorted(value)))
        if data.draw(st.integers(0, 5)) == 0:
            return {other: item for other, item in value.items() if other != key}
        return {**value, key: changed(data, value[key], depth + 1)}
    return data.draw(VALUES)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_anything_in_a_config_or_a_header(adapter, tmp_path, data):
    """Never a traceback, nor an escape sequence, nor many seconds."""
    folder = tmp_path / "changed"
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    if data.draw(st.booleans()):
        config = changed(data, json.loads((folder / "config.json").read_text()))
        (folder / "config.json").write_text(json.dumps(config))
    else:
        content = (folder / ADAPTER_WEIGHTS_NAME).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.dumps(changed(data, json.loads(content[8:end]))).encode()
        length = data.draw(st.just(len(header)) | st.integers(0, 2**64 - 1))
        (folder / ADAPTER_WEIGHTS_NAME).write_bytes(length.to_bytes(8, "little") + header + content[end:])
    start, out = time.monotonic(), StringIO()
    show(inspect(str(folder)), Terminal(file=out))
    assert "\x1b" not in out.getvalue() and ADAPTER_WEIGHTS_NAME in out.getvalue()
    assert time.monotonic() - start < 20


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
    console = Terminal(record=True, width=200)
    found = inspect(str(tmp_path))
    show(found, console)
    assert not found.problems and "not recorded; all gates are 0" in console.export_text()
