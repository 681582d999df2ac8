"""Pushes over HTTP, by train.py and by hand, and loading by name where this repository cannot be imported."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors.torch import load, load_file, save_file

from adapter_qwen3vl_pvm import ADAPTER_WEIGHTS_NAME
from hub_server import HubServer, serve
from pvm.checkpoints import push
from pvm.checkpoints.inspect import inspect
from pvm.checkpoints.loading import load_checkpoint
from training import PVM, ROOT, arguments


BASE, WHOLE = "org/base", "me/whole"
CODE = {path.name for path in ROOT.glob("*_qwen3vl_pvm.py")}
COMPLETE = {
    *(".gitattributes", "README.md", "config.json", "generation_config.json", "training.json"),
    *("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *(ADAPTER_WEIGHTS_NAME, *CODE),
}
LORA = {"lora/adapter_config.json", "lora/adapter_model.safetensors"}

# Imports once what takes seconds to import, and runs each job in a fork of its own.
MACHINE = """
import json, os, sys
import train
assert not {"matplotlib", "pvm.evaluation"} & sys.modules.keys(), "training needs neither"
import pvm.checkpoints.inspect
for job in sys.stdin:
    code, log = json.loads(job)
    pid = os.fork()
    if pid == 0:
        file = os.open(log, os.O_CREAT | os.O_WRONLY)
        os.dup2(file, 1), os.dup2(file, 2)
        exec(code, {})
        sys.stdout.flush()
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""
QUESTION = """
import torch
from PIL import Image
def answer(model, processor):
    content = [{"type": "image"}, {"type": "text", "text": "Cell first alpha?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    batch = processor(text=[prompt], images=[Image.new("RGB", (32, 32), (99, 9, 99))], return_tensors="pt")
    with torch.no_grad():
        return [round(value, 3) for value in model.eval()(**batch).logits[0, -1, :8].tolist()]
"""
# Loads checkpoints by name, and pushes one of them as a whole checkpoint.
NEWCOMER = f"""
import json, runpy, sys
runpy.run_path({str(ROOT / "pvm" / "torchvision_fallback.py")!r})["import_torchvision"]()
from transformers import AutoModelForImageTextToText, AutoProcessor
{QUESTION}
for name, revision, options in json.loads(sys.argv[1]):
    pins = {{"revision": revision, "code_revision": revision, "trust_remote_code": True}}
    model = AutoModelForImageTextToText.from_pretrained(name, **pins, **options)
    processor = AutoProcessor.from_pretrained(name if name != {WHOLE!r} else "me/pvm", trust_remote_code=True)
    print(json.dumps([type(model).__name__, model.config.base_model_name_or_path, answer(model, processor)]))
    if name == "me/pvm" and revision == "main" and not options:
        model.push_to_hub({WHOLE!r})
assert not any(name.split(".")[0] in ("pvm", "modeling_qwen3vl_pvm") for name in sys.modules), "this repository"
"""


@dataclass
class Machine:
    """A machine that knows this Hub and no other."""

    hub: HubServer
    folder: Path
    jobs: int = 0
    process: subprocess.Popen = field(init=False)
    pid: int = field(init=False)

    def __post_init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = self.hub.environment(self.folder / "home")
        self.process = subprocess.Popen([sys.executable, "-c", MACHINE], cwd=ROOT, env=environment, **pipes)

    def run(self, code: str, status: int = 0) -> str:
        """What the code prints."""
        self.jobs += 1
        log = self.folder / f"{self.jobs}.log"
        print(json.dumps([code, str(log)]), file=self.process.stdin, flush=True)
        self.pid = int(self.process.stdout.readline())
        assert int(self.process.stdout.readline()) == status, log.read_text()
        return log.read_text()

    def train(self, conversations: Path, method: str, *flags: str) -> str:
        name = method.replace("+", "_")
        push = ("--push_to_hub", "true", "--hub_model_id", f"me/{name}", "--save_steps", "2", "--method", method)
        flags = arguments(BASE, conversations, self.folder / name, *push, *flags)
        return self.run(f"import train; train.main({flags!r})")

    def push(self, folder: Path, repo_id: str, message: str, status: int = 0, **options: str) -> str:
        return self.run(
            "from huggingface_hub import HfApi; from pathlib import Path; from pvm.checkpoints.push import push\n"
            f"HfApi().create_repo({repo_id!r}, exist_ok=True)\n"
            f"push(Path({str(folder)!r}), {repo_id!r}, {message!r}, **{options!r})",
            status,
        )

    def push_base(self, folder: Path) -> str:
        """As anybody pushes a folder; the commit."""
        self.run(
            f"from huggingface_hub import HfApi; HfApi().create_repo({BASE!r}, exist_ok=True)\n"
            f"HfApi().upload_folder(repo_id={BASE!r}, folder_path={str(folder)!r})"
        )
        return self.hub.commits(BASE)[0].sha


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machine")
    with serve() as hub:
        machine = Machine(hub, folder)
        yield machine
        machine.process.stdin.close()
        machine.process.wait()


@dataclass
class Trained:
    """Three trainings that were pushed; since then there is another base under the base's name."""

    base_revision: str
    newer_base_revision: str
    output_of_lora: str


@pytest.fixture(scope="module")
def trained(machine, base, conversations) -> Trained:
    base_revision = machine.push_base(base)
    machine.train(conversations, "pvm", *PVM)
    machine.train(conversations, "pvm+lora", *PVM)
    machine.hub.fail_next_commit = True
    output = machine.train(conversations, "lora")

    newer = machine.folder / "newer"
    shutil.copytree(base, newer)
    weights = load_file(newer / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, newer / "model.safetensors", metadata={"format": "pt"})
    return Trained(base_revision, machine.push_base(newer), output)


@pytest.fixture(scope="module")
def newcomer(machine, trained, tmp_path_factory) -> tuple[dict[str, list], str]:
    """What a machine without this repository, and with an empty cache, gets by name; and all that it prints."""
    wishes = {
        "pvm": ("me/pvm", "main", {}),
        "step 2": ("me/pvm", machine.hub.commits("me/pvm")[1].sha, {}),
        "with LoRA": ("me/pvm_lora", "main", {}),
        "whole": (WHOLE, "main", {}),
        "newer base": ("me/pvm", "main", {"base_model_revision": "main"}),
    }
    folder = tmp_path_factory.mktemp("newcomer")
    result = subprocess.run(
        [sys.executable, "-I", "-c", NEWCOMER, json.dumps(list(wishes.values()))],
        **{"cwd": folder, "env": machine.hub.environment(folder / "home"), "text": True},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
    )
    assert result.returncode == 0, result.stdout
    answers = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('["')]
    return dict(zip(wishes, answers)), result.stdout


def answer_here(folder: Path, base: Path, tmp_path: Path) -> list[float]:
    """The same question to what a run saved on its machine, with its base from the disk."""
    shutil.copytree(folder, tmp_path / "copy")
    for name in ("config.json", "adapter_config.json"):
        if (file := tmp_path / "copy" / name).is_file():
            change = {"base_model_name_or_path": str(base), "base_model_revision": None, "revision": None}
            config = json.loads(file.read_text())
            file.write_text(json.dumps({**config, **{key: change[key] for key in change.keys() & config.keys()}}))
    checkpoint = load_checkpoint(str(tmp_path / "copy"))
    names = {}
    exec(QUESTION, names)
    return names["answer"](checkpoint.model, checkpoint.processor)


@pytest.mark.parametrize("method", ["pvm", "pvm+lora"])
def test_every_push_is_complete(machine, trained, base, conversations, method):
    repo = f"me/{method.replace('+', '_')}"
    # At the end there is nothing that step 4 had not pushed.
    assert machine.hub.titles(repo) == ["Training in progress, step 2", "Training in progress, step 4"]
    for commit, step in zip(machine.hub.commits(repo), (4, 2)):
        files = machine.hub.files(repo, commit.sha)
        assert files.keys() == (COMPLETE | LORA if method == "pvm+lora" else COMPLETE)
        config = json.loads(files["config.json"])
        assert len(config["auto_map"]) == 4
        assert (config["base_model_name_or_path"], config["base_model_revision"]) == (BASE, trained.base_revision)
        assert config["text_config"]["pvm_training"] == {
            "method": method,
            "step": step,
            "base_model": BASE,
            "base_revision": trained.base_revision,
            "image_dropout": 0.0,
        }
        assert f"base_model: {BASE}".encode() in files["README.md"]
        assert (b"Training in progress" in files["README.md"]) == (step == 2)
        assert len(load(files[ADAPTER_WEIGHTS_NAME])) == 3 * 15
        for name, content in files.items():
            for path in (machine.folder, base.parent, conversations.parent, ROOT, Path.home()):
                assert f"{path}/".encode() not in content, f"{name} names {path}"


@pytest.mark.parametrize(
    ("what", "folder"), [("pvm", "pvm"), ("step 2", "pvm/checkpoint-2"), ("with LoRA", "pvm_lora")]
)
def test_loads_by_name_into_the_base_it_was_trained_on(machine, newcomer, base, tmp_path, what, folder):
    """Whatever has become of the base's repository since."""
    answers, _ = newcomer
    expected = answer_here(machine.folder / folder, base, tmp_path)
    assert answers[what] == ["Qwen3VLPVMForConditionalGeneration", BASE, expected]
    assert what == "pvm" or answers[what] != answers["pvm"]


def test_the_newest_base_is_warned_about(trained, newcomer):
    answers, output = newcomer
    assert f"was trained on revision {trained.base_revision} of {BASE}" in " ".join(output.split())
    assert answers["newer base"] != answers["pvm"]


@pytest.mark.parametrize("method", ["pvm", "lora"])
def test_evaluations_take_the_base_it_was_trained_on_and_know_commits_apart(machine, trained, base, tmp_path, method):
    output = machine.run(
        f"{QUESTION}\nimport json\n"
        "from pvm.checkpoints.loading import load_checkpoint\n"
        "from pvm.checkpoints.names import checkpoint_state\n"
        f"checkpoint = load_checkpoint('me/{method}')\n"
        f"state = checkpoint_state('me/{method}')\n"
        "print(json.dumps([checkpoint.description.commit, state, answer(checkpoint.model, checkpoint.processor)]))"
    )
    commit, state, answer = json.loads(output.splitlines()[-1])
    assert state == [machine.hub.commits(f"me/{method}")[0].sha, trained.base_revision] and commit == state[0]
    assert answer == answer_here(machine.folder / method, base, tmp_path)


def test_a_push_that_fails_ends_no_training(machine, trained):
    assert "Step 2 is saved but could not be pushed" in trained.output_of_lora
    assert machine.hub.titles("me/lora") == ["Training in progress, step 4"]


def test_an_interrupted_push_changes_nothing(machine, trained):
    """Kill -9 in the middle of the upload of the weights: of the first push, and of a later one."""
    kill = lambda: os.kill(machine.pid, signal.SIGKILL)  # noqa: E731
    before, after = machine.folder / "pvm" / "checkpoint-2", machine.folder / "pvm"
    machine.hub.on_upload = kill
    machine.push(before, "me/killed", "step 2", status=signal.SIGKILL)
    machine.hub.on_upload = None
    assert set(machine.hub.files("me/killed")) == {".gitattributes"}
    machine.push(before, "me/killed", "step 2")
    machine.hub.on_upload = kill
    machine.push(after, "me/killed", "step 4", status=signal.SIGKILL)
    machine.hub.on_upload = None
    assert machine.hub.titles("me/killed") == ["step 2"]
    assert machine.hub.files("me/killed")[ADAPTER_WEIGHTS_NAME] == (before / ADAPTER_WEIGHTS_NAME).read_bytes()


@pytest.mark.parametrize("shortest", [10**9, 1])
def test_a_short_upload_has_no_bars(tmp_path, monkeypatch, shortest):
    seen = []
    monkeypatch.setattr(push.HfApi, "upload_folder", lambda *_, **__: seen.append(are_progress_bars_disabled()))
    monkeypatch.setattr(push, "BYTES_WITH_BARS", shortest)
    (tmp_path / "config.json").write_text("{}")
    push.push(tmp_path, "me/quiet", "A short upload")
    assert seen == [shortest > 1] and not are_progress_bars_disabled()


def test_a_branch_is_made(machine, trained):
    machine.push(machine.folder / "pvm" / "checkpoint-2", "me/pvm", "An experiment", revision="experiment")
    assert machine.hub.commits("me/pvm", "experiment")[0].title == "An experiment"
    assert machine.hub.titles("me/pvm")[-1] == "Training in progress, step 4"


def test_a_whole_checkpoint_pushed_by_hand(machine, newcomer):
    """`push_to_hub` of a model that was loaded as an adapter checkpoint: all weights, the code, no path."""
    answers, _ = newcomer
    files = machine.hub.files(WHOLE)
    assert {"model.safetensors", *CODE} <= files.keys() and ADAPTER_WEIGHTS_NAME not in files
    assert json.loads(files["config.json"])["base_model_name_or_path"] is None
    assert answers["whole"] == ["Qwen3VLPVMForConditionalGeneration", None, answers["pvm"][2]]

    # It is inspected like a folder, and of the weights only the branches are downloaded.
    requests = len(machine.hub.requests)
    output = machine.run(f"from pvm.checkpoints.inspect import main; main([{WHOLE!r}, '--json'])")
    remote, local = json.loads(output[output.index("\n{\n") if output[0] != "{" else 0 :]), machine.folder / "whole"
    assert {request.split()[-1] for request in machine.hub.requests[requests:] if "/object/" in request} == {"206"}
    local.mkdir()
    for name, content in files.items():
        (local / name).write_bytes(content)
    found = inspect(str(local))
    assert (remote["kind"], remote["branches"], remote["problems"]) == (found.kind, found.branches, [])
    assert remote["gates"] == {str(layer): gate for layer, gate in found.gates.items()}
    assert remote["files"]["model.safetensors"] == found.files["model.safetensors"]

    # An adapter checkpoint on top of it leaves no weights of it behind.
    machine.push(machine.folder / "pvm", WHOLE, "An adapter checkpoint")
    assert set(machine.hub.files(WHOLE)) == COMPLETE
