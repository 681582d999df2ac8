"""Runs that are stopped or disturbed from outside go on as if nothing had happened, and leave no incomplete files."""

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
from safetensors.torch import load_file

from adapter_qwen3vl_pvm import ADAPTER_WEIGHTS_NAME
from pvm.checkpoints import convert
from pvm.errors import UserError
from pvm.files import LOCK
from pvm.training import trainer
from pvm.training.saving import STAGING
from training import PVM, ROOT, losses, run, weights


FLAGS = (*PVM, "--save_steps", "1", "--max_steps", "8")
LAST = ("--resume_from_checkpoint", "last")


@pytest.fixture(scope="module")
def whole(base, conversations, tmp_path_factory) -> Path:
    """The run that nobody interrupts."""
    return run(base, conversations, tmp_path_factory.mktemp("whole") / "run", *FLAGS)


@pytest.fixture(scope="module")
def start(base, conversations, tmp_path_factory):
    """Start train.py as a process of its own, forked from one that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")  # Python 3.11 does not hand on sys.path
        forkserver.ensure_running()

    def start(output_dir: Path, *flags: str) -> tuple[multiprocessing.Process, Path]:
        """The process, and the file for its output."""
        log = tmp_path_factory.mktemp("log") / "output"
        process = context.Process(target=run_into, args=(log, base, conversations, output_dir, *flags))
        process.start()
        return process, log

    return start


def run_into(log: Path, *args) -> None:
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    run(*args)


def wait_for(condition, run: tuple[multiprocessing.Process, Path]) -> None:
    process, log = run
    deadline = time.monotonic() + 120
    while not condition():
        assert process.is_alive(), log.read_text()
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


def test_killed_during_a_save(base, conversations, whole, start, tmp_path):
    """Kill -9 while a checkpoint is being written, three times over."""
    output_dir = tmp_path / "run"
    staged = output_dir / STAGING
    for step in (2, 4, 6):
        process, log = start(output_dir, *FLAGS, *(LAST if output_dir.exists() else ()))
        wait_for((output_dir / f"checkpoint-{step}").exists, (process, log))
        wait_for(lambda: any(staged.glob(f"checkpoint-*/{ADAPTER_WEIGHTS_NAME}")), (process, log))
        process.kill()
        process.join()
        assert list(staged.iterdir()), "the save was over before the signal came: no test"
        assert_only_whole_checkpoints(output_dir)
        assert not (output_dir / "config.json").exists()
    run(base, conversations, output_dir, *FLAGS, *LAST)
    assert_same_run(output_dir, whole)
    assert not staged.exists()


def test_terminated(base, conversations, whole, start, tmp_path):
    """SIGTERM saves the step that was being made, and says how to resume."""
    output_dir = tmp_path / "run"
    process, log = start(output_dir, *FLAGS, "--save_steps", "100")
    wait_for(lambda: log.exists() and "'loss'" in log.read_text(), (process, log))  # the first step is over
    os.kill(process.pid, signal.SIGTERM)
    process.join(120)
    assert process.exitcode == 1
    assert "stopped by SIGTERM after step" in log.read_text() and "--resume_from_checkpoint last" in log.read_text()
    assert_only_whole_checkpoints(output_dir)
    assert not (output_dir / ADAPTER_WEIGHTS_NAME).exists(), "it is not finished"
    run(base, conversations, output_dir, *FLAGS, *LAST)
    assert_same_run(output_dir, whole)


def test_a_second_run_is_refused_and_the_first_goes_on(base, conversations, whole, start, tmp_path):
    """One is started at the same moment, one later, to resume, and one to write elsewhere into the folder."""
    output_dir = tmp_path / "run"
    runs = [start(output_dir, *FLAGS) for _ in range(2)]
    wait_for(lambda: any(not process.is_alive() for process, _ in runs), runs[0])
    (second, log), (first, first_log) = sorted(runs, key=lambda run: run[0].is_alive())
    assert second.exitcode == 1 and "Another process is writing into" in log.read_text()
    wait_for((output_dir / "checkpoint-1").exists, (first, first_log))
    with pytest.raises(UserError, match=f"Another process is writing into {output_dir}. Wait until it has finished"):
        run(base, conversations, output_dir, *FLAGS, *LAST)
    with pytest.raises(UserError, match="Another process is writing into"):
        convert.main([str(output_dir / "checkpoint-1"), str(output_dir), "--to", "whole"])
    first.join(120)
    assert first.exitcode == 0, first_log.read_text()
    assert_same_run(output_dir, whole)
    assert not (output_dir / LOCK).exists()


def test_killed_before_the_first_checkpoint_is_a_new_run(base, conversations, whole, tmp_path):
    (tmp_path / "run" / STAGING / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / STAGING / "checkpoint-1" / "config.json").write_text("{")
    assert_same_run(run(base, conversations, tmp_path / "run", *FLAGS), whole)


def test_a_full_disk(base, conversations, whole, tmp_path, monkeypatch):
    """The save fails, with a sentence; what was saved before is complete, and the run resumes when there is space."""
    save = trainer.save_float32_branches

    def full(folder, model):
        if folder.name == "checkpoint-3":
            raise OSError(28, "No space left on device")
        save(folder, model)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_float32_branches", full)
        with pytest.raises((OSError, UserError), match="No space left on device"):
            run(base, conversations, tmp_path / "run", *FLAGS)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert_only_whole_checkpoints(tmp_path / "run")
    assert_same_run(run(base, conversations, tmp_path / "run", *FLAGS, *LAST), whole)


def test_old_checkpoints_are_deleted(base, conversations, tmp_path):
    output_dir = run(base, conversations, tmp_path / "run", *FLAGS, "--save_total_limit", "2")
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-7", "checkpoint-8"]
