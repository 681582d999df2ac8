"""Real pushes over HTTP, by train.py, and loading by name where nothing of this repository can be imported."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from configuration_qwen3vl_pvm import ADAPTER_WEIGHTS_NAME
from hub_server import HubServer, serve
from pvm.checkpoints.loading import load_checkpoint
from training import PVM, ROOT, arguments


BASE, REPO = "org/base", "me/pvm"
FLAGS = ("--push_to_hub", "true", "--hub_model_id", REPO, "--save_steps", "2")
COMPLETE = {
    *(".gitattributes", "README.md", "config.json", "generation_config.json", "training.json"),
    *("configuration_qwen3vl_pvm.py", "modeling_qwen3vl_pvm.py", ADAPTER_WEIGHTS_NAME),
    *("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
}
LORA = {"lora/adapter_config.json", "lora/adapter_model.safetensors"}


@pytest.fixture
def hub(base, tmp_path):
    """A Hub with a base on it."""
    with serve(tmp_path / "hub") as server:
        push = f"""
from huggingface_hub import HfApi
HfApi().create_repo({BASE!r})
HfApi().upload_folder(repo_id={BASE!r}, folder_path={str(base)!r})
"""
        finish(client(server, tmp_path / "home of the base", "-c", push))
        yield server


def client(hub: HubServer, home: Path, *command: str, cwd: Path = ROOT) -> subprocess.Popen:
    """A process that knows this Hub and no other, with an empty cache."""
    environment = {**hub.environment(home), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    return output


def train(hub: HubServer, conversations: Path, folder: Path, *flags: str) -> subprocess.Popen:
    command = arguments(BASE, conversations, folder / "run", *FLAGS, *flags)
    return client(hub, folder / "home", str(ROOT / "train.py"), *command)


def titles(hub: HubServer) -> list[str]:
    return [commit.title for commit in hub.commits(REPO)][::-1][1:]


def load_by_name(hub: HubServer, folder: Path, revision: str = "main", **options: str) -> list[str]:
    """What a newcomer's machine prints; at the end the class, the base, and logits of a question."""
    fallback = ROOT / "pvm" / "torchvision_fallback.py"
    script = f"""
import runpy, sys
runpy.run_path({str(fallback)!r})["import_torchvision"]()
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
pins = {{"revision": {revision!r}, "code_revision": {revision!r}, "trust_remote_code": True}}
processor = AutoProcessor.from_pretrained({REPO!r}, **pins)
model = AutoModelForImageTextToText.from_pretrained({REPO!r}, **pins, **{options!r})
assert not any(name.split(".")[0] in ("pvm", "modeling_qwen3vl_pvm") for name in sys.modules), "this repository"
{QUESTION}
print(type(model).__name__, model.config.base_model_name_or_path, answer(model, processor), sep="\\n")
"""
    folder.mkdir()
    return finish(client(hub, folder / "home", "-I", "-c", script, cwd=folder)).splitlines()


QUESTION = """
def answer(model, processor):
    content = [{"type": "image"}, {"type": "text", "text": "Cell first alpha?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    batch = processor(text=[prompt], images=[Image.new("RGB", (32, 32), (99, 9, 99))], return_tensors="pt")
    with torch.no_grad():
        return [round(value, 3) for value in model.eval()(**batch).logits[0, -1, :8].tolist()]
"""


def answer_here(folder: Path, base: Path) -> str:
    """The same from what a run saved on this machine, with its base from the disk."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    checkpoint = load_checkpoint(str(folder))
    names = {"torch": torch}
    exec("from PIL import Image\n" + QUESTION, names)
    return str(names["answer"](checkpoint.model, checkpoint.processor))


@pytest.mark.parametrize("method", ["pvm", "pvm+lora"])
def test_every_push_is_whole_and_loads_by_name(hub, base, conversations, tmp_path, method):
    finish(train(hub, conversations, tmp_path, *PVM, "--method", method))
    # At the end there is nothing that step 4 had not pushed.
    assert titles(hub) == ["Training in progress, step 2", "Training in progress, step 4"]
    base_revision = hub.commits(BASE)[0].sha
    for commit, step in zip(hub.commits(REPO), (4, 2)):
        files = hub.files(REPO, commit.sha)
        assert files.keys() == (COMPLETE | LORA if method == "pvm+lora" else COMPLETE)
        config = json.loads(files["config.json"])
        assert len(config["auto_map"]) == 4
        assert (config["base_model_name_or_path"], config["base_model_revision"]) == (BASE, base_revision)
        assert config["text_config"]["pvm_training"] == {
            "method": method,
            "step": step,
            "base_model": BASE,
            "base_revision": base_revision,
        }
        assert f"base_model: {BASE}".encode() in files["README.md"]
        assert (b"Training in progress" in files["README.md"]) == (step == 2)
        assert len(load(files[ADAPTER_WEIGHTS_NAME])) == 3 * 15
        for name, content in files.items():
            for path in (tmp_path, base.parent, conversations.parent, ROOT, Path.home()):
                assert f"{path}/".encode() not in content, f"{name} names {path}"

    *_, named, of, answer = load_by_name(hub, tmp_path / "newcomer")
    assert (named, of) == ("Qwen3VLPVMForConditionalGeneration", BASE)
    assert answer == answer_here(tmp_path / "run", base)
    step_2 = hub.commits(REPO)[1].sha
    *_, earlier = load_by_name(hub, tmp_path / "another", step_2)
    assert earlier == answer_here(tmp_path / "run" / "checkpoint-2", base) != answer


def push_another_base(hub: HubServer, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "newer")
    weights = load_file(tmp_path / "newer" / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, tmp_path / "newer" / "model.safetensors", metadata={"format": "pt"})
    push = "from huggingface_hub import upload_folder; import sys; upload_folder(repo_id=sys.argv[1], folder_path='.')"
    finish(client(hub, tmp_path / "home", "-c", push, BASE, cwd=tmp_path / "newer"))


def test_the_base_is_the_one_that_was_trained_on(hub, base, conversations, tmp_path):
    """Whatever becomes of the base's repository; and who asks for its newest state is warned."""
    finish(train(hub, conversations, tmp_path, *PVM, "--hub_strategy", "end"))
    before = load_by_name(hub, tmp_path / "before")
    push_another_base(hub, base, tmp_path)
    assert len(hub.commits(BASE)) == 3
    assert load_by_name(hub, tmp_path / "after")[-3:] == before[-3:]

    *output, _, _, answer = load_by_name(hub, tmp_path / "newest", base_model_revision="main")
    assert f"was trained on revision {hub.commits(BASE)[1].sha} of {BASE}" in "\n".join(output)
    assert answer != before[-1]


@pytest.mark.parametrize("method", ["pvm", "lora"])
def test_evaluations_take_the_base_that_was_trained_on_and_know_commits_apart(
    hub, base, conversations, tmp_path, method
):
    flags = PVM if method == "pvm" else ("--method", "lora")
    finish(train(hub, conversations, tmp_path, *flags, "--hub_strategy", "end"))
    script = f"""
import json
from pvm.checkpoints.loading import checkpoint_state, load_checkpoint
import torch
from PIL import Image
{QUESTION}
checkpoint = load_checkpoint({REPO!r})
print(json.dumps([checkpoint_state({REPO!r}), answer(checkpoint.model, checkpoint.processor)]))
"""
    before, after = [], []
    for found in (before, after):
        output = finish(client(hub, tmp_path / f"home {len(before)}", "-c", script))
        found += json.loads(output.splitlines()[-1])
        if found is before:
            push_another_base(hub, base, tmp_path)
    assert before == after
    assert before[0] == [hub.commits(REPO)[0].sha, hub.commits(BASE)[1].sha]


def test_a_whole_checkpoint_pushed_by_hand(hub, base, conversations, tmp_path):
    """`push_to_hub` of a model that was loaded as an adapter: all weights, the code, no path."""
    finish(train(hub, conversations, tmp_path, *PVM, "--hub_strategy", "end"))
    adapter = hub.commits(REPO)[0].sha
    script = f"""
import runpy
runpy.run_path({str(ROOT / "pvm" / "torchvision_fallback.py")!r})["import_torchvision"]()
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained({REPO!r}, trust_remote_code=True)
model.push_to_hub({REPO!r})
"""
    (tmp_path / "elsewhere").mkdir()
    finish(client(hub, tmp_path / "home", "-I", "-c", script, cwd=tmp_path / "elsewhere"))
    files = hub.files(REPO)
    assert "model.safetensors" in files and "modeling_qwen3vl_pvm.py" in files
    assert json.loads(files["config.json"])["base_model_name_or_path"] is None
    assert not [name for name, content in files.items() if f"{tmp_path}/".encode() in content]
    assert load_by_name(hub, tmp_path / "a")[-1] == load_by_name(hub, tmp_path / "b", adapter)[-1]


def test_a_push_that_fails_ends_no_training(hub, base, conversations, tmp_path):
    hub.fail_next_commit = True
    output = finish(train(hub, conversations, tmp_path, *PVM))
    assert "Step 2 is saved but could not be pushed; training goes on." in output
    assert titles(hub) == ["Training in progress, step 4"]


def test_an_interrupted_push_leaves_the_former_one(hub, base, conversations, tmp_path):
    """Kill -9 in the middle of the upload of step 4's weights."""
    process = None
    uploads = []

    def kill():
        uploads.append(process)
        if len(uploads) == 2:
            os.kill(process.pid, signal.SIGKILL)

    hub.on_upload = kill
    process = train(hub, conversations, tmp_path, *PVM)
    process.communicate(timeout=180)
    hub.on_upload = None
    assert process.returncode == -signal.SIGKILL and len(uploads) == 2
    assert titles(hub) == ["Training in progress, step 2"]
    *_, answer = load_by_name(hub, tmp_path / "newcomer")
    assert answer == answer_here(tmp_path / "run" / "checkpoint-2", base)


def test_an_interrupted_first_push_cannot_be_loaded(hub, conversations, tmp_path):
    hub.on_upload = lambda: os.kill(process.pid, signal.SIGKILL)
    process = train(hub, conversations, tmp_path, *PVM)
    process.communicate(timeout=180)
    assert set(hub.files(REPO)) == {".gitattributes"}


def test_a_push_replaces_weights_of_another_kind(hub, conversations, tmp_path):
    """An adapter over a repository that held a whole model: no weights of it stay behind."""
    finish(train(hub, conversations, tmp_path / "full", "--method", "full", "--hub_strategy", "end"))
    assert "model.safetensors" in hub.files(REPO)
    finish(train(hub, conversations, tmp_path / "pvm", *PVM, "--hub_strategy", "end"))
    assert set(hub.files(REPO)) == COMPLETE
