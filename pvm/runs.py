"""`pvm train` and `pvm eval` as processes of their own, for studies and the demo."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from pvm.errors import UserError


# One of these is in the folder of a finished training.
FINISHED = ("model.pvm.safetensors", "adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")

RunCommand = Callable[[str, list[str], Path | None], int]


def run_command(command: str, flags: list[str], log: Path | None = None) -> int:
    """
    Run `pvm train` or `pvm eval` as a process.

    Args:
        command (`str`): "train" or "eval".
        log (`Path`, *optional*): the file to which its output is appended.

    Returns:
        `int`: its exit status.
    """
    words = [sys.executable, "-m", "pvm", command, *flags]
    if log is None:
        return subprocess.run(words).returncode
    with open(log, "a", encoding="utf-8") as output:
        return subprocess.run(words, stdout=output, stderr=subprocess.STDOUT).returncode


def train(output_dir: Path, flags: list[str], log: Path | None, run_command: RunCommand) -> None:
    """
    Train, go on from the last checkpoint, or do nothing if there is a result.

    Args:
        output_dir (`Path`): the `output_dir` of these flags.
        flags (`list[str]`): of `pvm train`.
        log (`Path`, *optional*): see [`run_command`].

    Raises:
        UserError: if it fails.
    """
    if any((output_dir / file).is_file() for file in FINISHED):
        return
    if output_dir.is_dir() and get_last_checkpoint(output_dir):
        flags = [*flags, "--resume_from_checkpoint=last"]
    if run_command("train", flags, log):
        if log is None:
            raise UserError(f"The training {output_dir} failed.")
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise UserError(f"The training {output_dir} failed, see {log}: {' '.join(last)}")
