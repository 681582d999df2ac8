"""
Two processes with gloo, launched with the accelerate configs in recipes/: what they learn is what one process learns.

The GPUs that the configs name are replaced by the CPU; everything else in them counts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from pvm.checkpoints.loading import load_checkpoint
from pvm.files import locked
from training import PVM, ROOT, arguments, losses, run, weights


# One conversation at a time, so that in some steps one of the two ranks has no image at all.
FLAGS = ("--max_steps", "6", "--save_steps", "3", "--per_device_train_batch_size", "1")
METHODS = {
    "pvm": PVM,
    "pvm-bf16": (*PVM, "--dtype", "bfloat16"),
    "lora": ("--method", "lora"),
    "pvm+lora": (*PVM, "--method", "pvm+lora"),
    "pvm-no-image": (*PVM, "--image_dropout", "1"),
}
LEARNED = [("ddp", "pvm"), ("ddp", "pvm+lora"), ("ddp", "pvm-no-image"), *(("fsdp2", method) for method in METHODS)]
FINISHED = [("ddp", "pvm+lora"), ("fsdp2", "pvm-bf16"), ("fsdp2", "pvm+lora")]
LAST = ("--resume_from_checkpoint", "last")
TRAINS = {"ddp": "branches", "fsdp2": "language_model+branches"}
GRPO = (
    *("--per_device_train_batch_size", "4", "--num_generations", "4", "--max_completion_length", "6"),
    *("--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no", "--learning_rate", "1e-3"),
    *("--mask_truncated_completions", "false", "--reward_weights", "1", "--reward_functions"),
)


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def config(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(config, base, conversations, tmp_path_factory) -> Path:
    """All runs of one accelerate config, each in a subfolder; what rank N printed is in `<run>.log.N`."""
    folder = tmp_path_factory.mktemp(config)
    cases = []

    def add(name: str, *flags: str, data: Path = conversations, output: str | None = None, **case) -> None:
        case["arguments"] = arguments(base, data, folder / (output or name), *FLAGS, *flags)
        cases.append({**case, "log": str(folder / f"{name}.log")})

    for method in (method for launcher, method in LEARNED if launcher == config):
        add(method, *METHODS[method])
    for method in (method for launcher, method in FINISHED if launcher == config):
        name = f"finished-{method}"
        copy = [str(folder / run / "checkpoint-6") for run in (method, name)]
        add(name, *METHODS[method], *LAST, copy=copy)
    add("interrupted", *PVM, "--save_steps", "100", terminated=1)
    add("resumed", *PVM, "--save_steps", "100", *LAST, output="interrupted")
    rewards = folder / "rewards.py"
    rewards.write_text("def words(completions, **kwargs): return [len(c[0]['content'].split()) for c in completions]")
    names = {"model_name_or_path": folder / "pvm", "dataset_name": conversations, "output_dir": folder / "grpo"}
    flags = [str(word) for name, value in names.items() for word in (f"--{name}", value)]
    cases.append({"second_stage": True, "arguments": [*flags, *GRPO, f"{rewards}:words", "--trains", TRAINS[config]]})
    cases[-1]["log"] = str(folder / "grpo.log")
    if config == "ddp":
        write_two_files(folder / "data", conversations)
        for workers in ("0", "2"):
            flags = ("--streaming", "true", "--dataloader_num_workers", workers, "--max_steps", "8")
            add(f"stream-{workers}", *PVM, *flags, data=folder / "data")
        add("refused", *PVM, "--streaming", "true", "--dataloader_num_workers", "7")
        add("locked", *PVM)
    (folder / "cases.json").write_text(json.dumps(cases))
    with locked(folder / "locked"):
        launch(config, folder / "cases.json")
    return folder


def write_two_files(folder: Path, conversations: Path) -> None:
    """A data set of two files, one of them without a row."""
    rows = [json.loads(line) for line in conversations.read_text().splitlines()]
    rows = [{**row, "images": [str(conversations.parent / image) for image in row["images"]]} for row in rows]
    folder.mkdir()
    (folder / "0-train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "1-train.jsonl").write_text("\n")


def launch(config: str, cases: Path) -> None:
    """`accelerate launch --config_file recipes/accelerate/<config>.yaml` with two processes on the CPU."""
    file = ROOT / "recipes" / "accelerate" / f"{config}.yaml"
    parsed = launch_command_parser().parse_args(["--config_file", str(file), "--num_processes", "2", "train.py"])
    parsed, _, _ = _validate_launch_command(parsed)
    environment = {**os.environ, **prepare_multi_gpu_env(parsed), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_TORCH_DEVICE": "cpu"} if parsed.use_fsdp else {"ACCELERATE_USE_CPU": "true"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *torchrun, str(ROOT / "tests" / "distributed_cases.py"), str(cases)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def alone(base, conversations, tmp_path_factory):
    """The same micro-batches in one process, by gradient accumulation."""
    folder = tmp_path_factory.mktemp("alone")

    def runs(method: str) -> Path:
        if not (folder / method).exists():
            flags = (*FLAGS, *METHODS[method], "--gradient_accumulation_steps", "2", "--save_strategy", "no")
            run(base, conversations, folder / method, *flags)
        return folder / method

    return runs


def assert_same_weights(actual: Path, expected: Path, atol: float):
    ours, theirs = weights(actual), weights(expected)
    assert theirs and ours.keys() == theirs.keys()
    for key, weight in theirs.items():
        torch.testing.assert_close(ours[key], weight, atol=atol, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


def test_two_processes_learn_what_one_does(config, folder, alone):
    for method in (method for launcher, method in LEARNED if launcher == config):
        expected = alone(method)
        assert "The frozen weights did not change" in (folder / f"{method}.log.0").read_text()
        assert losses(folder / method) == pytest.approx(losses(expected), abs=2e-3 if "bf16" in method else 1e-4)
        # AdamW divides by the size of the gradient, so float noise in a tiny one moves a weight by up to the rate.
        assert_same_weights(folder / method, expected, atol=2e-2 if "bf16" in method else 2e-4)
        sharded = list((folder / method / "checkpoint-3").glob("pytorch_model_fsdp*"))
        assert bool(sharded) == (config == "fsdp2"), "FSDP was not on, or was on"
        for checkpoint in (folder / method, folder / method / "checkpoint-3"):  # in one process, without sharding
            assert load_checkpoint(str(checkpoint)).description.step in (3, 6)


def test_an_interrupted_run_of_two_processes_is_resumed_exactly(folder):
    """SIGTERM reached one rank alone, and both saved and stopped after the same step."""
    for rank in (0, 1):
        assert "stopped by SIGTERM after step 3" in (folder / f"interrupted.log.{rank}").read_text()
    names = {path.name for path in (folder / "interrupted").glob("checkpoint-*")}
    assert names == {"checkpoint-3", "checkpoint-6"}  # the second one is the end of the resumed run
    assert losses(folder / "interrupted") == losses(folder / "pvm")
    assert_same_weights(folder / "interrupted", folder / "pvm", atol=0)


def test_a_finished_run_of_two_processes_is_only_saved(config, folder):
    """As when the final save was killed: what it would have written is written, and no step is made."""
    for method in (method for launcher, method in FINISHED if launcher == config):
        finished = folder / f"finished-{method}"
        assert "The frozen weights did not change" in (folder / f"finished-{method}.log.0").read_text()
        assert losses(finished) == losses(folder / method)
        assert_same_weights(finished, folder / method, atol=0)
        assert [path.name for path in finished.glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize("config", ["ddp"], indirect=True)
def test_two_processes_on_one_stream(folder):
    """Two files, one of them without a row: neither a rank nor one of its workers runs out."""
    for workers in ("0", "2"):
        assert "The frozen weights did not change" in (folder / f"stream-{workers}.log.0").read_text()
        assert len(losses(folder / f"stream-{workers}")) == 8


@pytest.mark.parametrize("config", ["ddp"], indirect=True)
def test_two_processes_refuse_a_stream_alike(folder):
    for rank in (0, 1):
        assert "UserError: " in (folder / f"refused.log.{rank}").read_text()
        assert "data.jsonl has 12 rows for 14 readers" in (folder / f"refused.log.{rank}").read_text()


@pytest.mark.parametrize("config", ["ddp"], indirect=True)
def test_two_processes_are_refused_alike_where_another_process_writes(folder):
    for rank in (0, 1):
        assert "UserError: Another process is writing into" in (folder / f"locked.log.{rank}").read_text()


def test_the_second_stage(config, folder):
    """Both ranks sample; what they save is loaded in one process."""
    log = json.loads((folder / "grpo" / "trainer_state.json").read_text())["log_history"]
    differences = [entry["sampling/sampling_logp_difference/mean"] for entry in log if "reward" in entry]
    assert len(differences) == 2 and max(differences) < 1e-4
    assert any(entry["reward_std"] > 0 for entry in log if "reward" in entry)
    before, after = (load_checkpoint(str(folder / name)).model.state_dict() for name in ("pvm", "grpo"))
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    expected = {name for name in before if ".visual." not in name and (config == "fsdp2" or ".pvm_block." in name)}
    assert moved and moved <= expected
    assert any(".pvm_block." in name for name in moved)
    assert any("lm_head" in name for name in moved) == (config == "fsdp2")
