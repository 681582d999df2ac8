"""
Two processes with gloo, launched with the accelerate configs that ship: what they learn is what one process learns.

The GPUs that the configs name are replaced by the CPU; everything else in them counts.
"""

import json
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from configuration_qwen3vl_pvm import ADAPTER_WEIGHTS_NAME
from pvm.checkpoints.loading import load_checkpoint
from training import PVM, ROOT, losses, run, start, weights


# One conversation at a time, so that in some steps one of the two ranks has no image at all.
FLAGS = ("--max_steps", "6", "--save_steps", "3", "--per_device_train_batch_size", "1")
METHODS = {
    "pvm": PVM,
    "pvm-bf16": (*PVM, "--dtype", "bfloat16"),
    "lora": ("--method", "lora"),
    "pvm+lora": (*PVM, "--method", "pvm+lora"),
}


def launch(config: str, *args):
    """`accelerate launch --config_file recipes/accelerate/<config>.yaml` with two processes on the CPU."""
    file = ROOT / "recipes" / "accelerate" / f"{config}.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "--num_processes", "2", "train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    environment = {**prepare_multi_gpu_env(arguments), "ACCELERATE_USE_CPU": "true"}
    script = ROOT / "train.py"
    if arguments.use_fsdp:
        environment |= {"ACCELERATE_TORCH_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
        script = ROOT / "tests" / "fsdp_on_cpu.py"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    return start(torchrun, *args, environment=environment)


def finish(process) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def alone(base, conversations, tmp_path_factory):
    """The same micro-batches in one process, by gradient accumulation."""
    folder = tmp_path_factory.mktemp("alone")
    done: dict[str, Path] = {}

    def runs(method: str) -> Path:
        if method not in done:
            flags = (*FLAGS, *METHODS[method], "--gradient_accumulation_steps", "2")
            done[method] = run(base, conversations, folder / method, *flags)
        return done[method]

    return runs


def assert_same_weights(actual: Path, expected: Path, atol: float):
    ours, theirs = weights(actual), weights(expected)
    assert theirs and ours.keys() == theirs.keys()
    for key, weight in theirs.items():
        torch.testing.assert_close(ours[key], weight, atol=atol, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    ("config", "method"), [("ddp", "pvm"), ("ddp", "pvm+lora"), *(("fsdp2", method) for method in METHODS)]
)
def test_two_processes_learn_what_one_does(base, conversations, alone, tmp_path, config, method):
    output = finish(launch(config, base, conversations, tmp_path / "run", *FLAGS, *METHODS[method]))
    expected = alone(method)
    assert "Everything frozen is as it was" in output
    assert losses(tmp_path / "run") == pytest.approx(losses(expected), abs=2e-3 if "bf16" in method else 1e-4)
    # AdamW divides by the size of the gradient, so float noise in a tiny one moves a weight by up to the rate.
    assert_same_weights(tmp_path / "run", expected, atol=2e-2 if "bf16" in method else 2e-4)
    sharded = list((tmp_path / "run" / "checkpoint-3").glob("pytorch_model_fsdp*"))
    assert bool(sharded) == (config == "fsdp2"), "FSDP was not on, or was on"
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-3"):  # in one process, without sharding
        assert load_checkpoint(str(folder)).description.step in (3, 6)


def interrupt(process) -> str:
    """SIGTERM to one of the two ranks after the first step; what was printed."""
    output = ""
    while "'loss'" not in output:
        line = process.stdout.readline()
        assert line, output
        output += line
    ranks = [child for child in psutil.Process(process.pid).children() if "torch" not in child.name()]
    ranks[1].send_signal(signal.SIGTERM)
    return output + process.communicate(timeout=120)[0]


@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_an_interrupted_run_of_two_processes_goes_on(base, conversations, tmp_path, config):
    """Both ranks save and stop after the same step."""
    flags = (*FLAGS, *METHODS["pvm"], "--save_steps", "100")
    finish(launch(config, base, conversations, tmp_path / "whole", *flags))
    output = interrupt(launch(config, base, conversations, tmp_path / "run", *flags))
    assert "stopped by SIGTERM after step" in output
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert 1 <= int(checkpoint.name.rpartition("-")[2]) < 6
    finish(launch(config, base, conversations, tmp_path / "run", *flags, "--resume_from_checkpoint", "last"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "run", tmp_path / "whole", atol=0)


@pytest.mark.parametrize(("config", "method"), [("ddp", "pvm+lora"), ("fsdp2", "pvm-bf16"), ("fsdp2", "pvm+lora")])
def test_a_finished_run_of_two_processes_is_only_saved(base, conversations, tmp_path, config, method):
    """As when the final save was killed: what it would have written is written, and no step is made."""
    flags = (*FLAGS, *METHODS[method], "--max_steps", "2", "--save_steps", "2")
    finish(launch(config, base, conversations, tmp_path / "run", *flags))
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    for lost in (ADAPTER_WEIGHTS_NAME, "config.json", "trainer_state.json"):
        (tmp_path / "run" / lost).unlink()
    output = finish(launch(config, base, conversations, tmp_path / "run", *flags, "--resume_from_checkpoint", "last"))
    assert "Everything frozen is as it was" in output
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "run", tmp_path / "whole", atol=0)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_two_processes_on_one_stream(base, conversations, tmp_path):
    """Two files, one of them without a row: neither a rank nor one of its workers runs out."""
    rows = [json.loads(line) for line in conversations.read_text().splitlines()]
    rows = [{**row, "images": [str(conversations.parent / image) for image in row["images"]]} for row in rows]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0-train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data" / "1-train.jsonl").write_text("\n")
    for workers in ("0", "2"):
        flags = ("--streaming", "true", "--dataloader_num_workers", workers, "--max_steps", "20")
        process = launch("ddp", base, tmp_path / "data", tmp_path / workers, *FLAGS, *METHODS["pvm"], *flags)
        assert "Everything frozen is as it was" in finish(process)
        assert len(losses(tmp_path / workers)) == 20


def test_two_processes_refuse_a_stream_alike(base, conversations, tmp_path):
    flags = ("--streaming", "true", "--dataloader_num_workers", "7")
    process = launch("ddp", base, conversations, tmp_path / "run", *FLAGS, *METHODS["pvm"], *flags)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and output.count("train.py: error:") == 2
    assert output.count("data.jsonl has 12 rows for 14 readers") == 2
