"""Runs that are stopped from outside go on as if nothing had happened, and leave nothing half-written behind."""

import os
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from configuration_qwen3vl_pvm import ADAPTER_WEIGHTS_NAME
from pvm.errors import UserError
from pvm.training.trainer import STAGING, PVMTrainer
from training import PVM, ROOT, losses, run, start, weights


FLAGS = (*PVM, "--save_steps", "1", "--max_steps", "8")
LAST = ("--resume_from_checkpoint", "last")


@pytest.fixture(scope="module")
def whole(base, conversations, tmp_path_factory) -> Path:
    """The run that nobody interrupts."""
    return run(base, conversations, tmp_path_factory.mktemp("whole") / "run", *FLAGS)


def wait_for(condition, process, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def assert_same_run(resumed: Path, whole: Path):
    assert losses(resumed) == losses(whole)
    expected, actual = (weights(folder) for folder in (whole, resumed))
    assert expected and all((expected[name] == actual[name]).all() for name in expected)


def assert_only_whole_checkpoints(output_dir: Path):
    for checkpoint in output_dir.glob("checkpoint-*"):
        names = {path.name for path in checkpoint.iterdir()}
        assert {ADAPTER_WEIGHTS_NAME, "config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= names
        load_file(checkpoint / ADAPTER_WEIGHTS_NAME)


def test_killed_during_a_save(base, conversations, whole, tmp_path):
    """Kill -9 while a checkpoint is being written, three times over."""
    output_dir = tmp_path / "run"
    for step in (2, 4, 6):
        resume = LAST if output_dir.exists() else ()
        process = start([str(ROOT / "train.py")], base, conversations, output_dir, *FLAGS, *resume)
        wait_for((output_dir / f"checkpoint-{step}").exists, process)
        staged = output_dir / STAGING
        wait_for(lambda staged=staged: any(staged.glob(f"checkpoint-*/{ADAPTER_WEIGHTS_NAME}")), process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert list(staged.iterdir()), "the save was over before the signal came: no test"
        assert_only_whole_checkpoints(output_dir)
        assert not (output_dir / "config.json").exists()
    run(base, conversations, output_dir, *FLAGS, *LAST)
    assert_same_run(output_dir, whole)
    assert not (output_dir / STAGING).exists()


def test_terminated(base, conversations, whole, tmp_path):
    """SIGTERM saves the step that was being made, and says how to go on."""
    output_dir = tmp_path / "run"
    process = start([str(ROOT / "train.py")], base, conversations, output_dir, *FLAGS, "--save_steps", "100")
    output = ""
    while "'loss'" not in output:  # the first step is over
        line = process.stdout.readline()
        assert line, output
        output += line
    os.kill(process.pid, signal.SIGTERM)
    output += process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "stopped by SIGTERM after step" in output and "--resume_from_checkpoint last" in output
    assert_only_whole_checkpoints(output_dir)
    assert not (output_dir / ADAPTER_WEIGHTS_NAME).exists(), "it is not finished"
    run(base, conversations, output_dir, *FLAGS, *LAST)
    assert_same_run(output_dir, whole)


def test_killed_before_the_first_checkpoint_is_a_new_run(base, conversations, whole, tmp_path):
    (tmp_path / "run" / STAGING / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / STAGING / "checkpoint-1" / "config.json").write_text("{")
    assert_same_run(run(base, conversations, tmp_path / "run", *FLAGS), whole)


def test_a_full_disk(base, conversations, whole, tmp_path, monkeypatch, capsys):
    """The save fails, with a sentence; what was saved before is whole, and the run goes on when there is room."""
    save = PVMTrainer._save_optimizer_and_scheduler

    def full(self, output_dir):
        if self.state.global_step == 3:
            raise OSError(28, "No space left on device")
        save(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(PVMTrainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises((OSError, UserError), match="No space left on device"):
            run(base, conversations, tmp_path / "run", *FLAGS)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert_only_whole_checkpoints(tmp_path / "run")
    assert_same_run(run(base, conversations, tmp_path / "run", *FLAGS, *LAST), whole)


def test_old_checkpoints_are_deleted(base, conversations, tmp_path):
    output_dir = run(base, conversations, tmp_path / "run", *FLAGS, "--save_total_limit", "2")
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-7", "checkpoint-8"]
