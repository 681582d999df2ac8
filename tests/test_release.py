"""Checkpoints that earlier releases wrote are loaded, by this release's code and by the code that they bring along."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration
from pvm.checkpoints import code
from pvm.checkpoints.inspect import inspect
from release_fixture import code_hashes


RELEASES = sorted(Path(__file__).parent.glob("release_*/"))
KINDS = ("whole", "adapter", "adapter_with_lora")


def expected(release: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs, and the logits of each kind."""
    recorded = load_file(release / "expected.safetensors")
    return {key: value for key, value in recorded.items() if key not in KINDS}, {key: recorded[key] for key in KINDS}


def base(release: Path, kind: str) -> dict[str, str]:
    return {} if kind == "whole" else {"base_model_name_or_path": str(release / "base")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_is_loaded(release, kind):
    batch, logits = expected(release)
    load = Qwen3VLPVMForConditionalGeneration.from_pretrained
    model = load(release / kind, dtype="float32", **base(release, kind))
    torch.testing.assert_close(tiny.logits(model, batch), logits[kind], atol=1e-5, rtol=0)
    found = inspect(str(release / kind))
    assert found.layers == [1, 2] and list(found.gates.values()) == [0.5, 0.5] and not found.problems


def test_inspect_knows_the_code_of_every_release():
    known = json.loads(code.RELEASES.read_text())
    assert known == {release.name.removeprefix("release_"): code_hashes(release / "whole") for release in RELEASES}
    for release in RELEASES:
        for kind in KINDS:
            found = inspect(str(release / kind))
            assert set(found.code) == {file.name for file in (release / kind).glob("*.py")}
            assert set(found.code.values()) == {f"release {release.name.removeprefix('release_')}"}


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_the_kinds_differ(release):
    _, logits = expected(release)
    assert torch.equal(logits["whole"], logits["adapter"])
    assert (logits["whole"] - logits["adapter_with_lora"]).abs().max() > 0.1


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_is_loaded_by_its_own_code(release, tmp_path):
    script = f"""
import runpy
runpy.run_path({str(Path(__file__).parent.parent / "pvm" / "torchvision_fallback.py")!r})["import_torchvision"]()
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
recorded = load_file({str(release / "expected.safetensors")!r})
batch = {{key: value for key, value in recorded.items() if key not in {KINDS!r}}}
for kind in {KINDS!r}:
    base = {{}} if kind == "whole" else {{"base_model_name_or_path": {str(release / "base")!r}}}
    model = AutoModelForImageTextToText.from_pretrained(
        {str(release)!r} + "/" + kind, trust_remote_code=True, dtype="float32", **base
    )
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, use_cache=False).logits, recorded[kind], atol=1e-5, rtol=0)
    print(type(model).__module__)
"""
    result = subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [line.startswith("transformers_modules.") for line in result.stdout.splitlines()] == [True] * 3
