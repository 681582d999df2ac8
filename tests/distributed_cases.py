"""
The workers of test_distributed.py: several runs of train.py or grpo.py one after another in the same processes,
because starting a process takes longer than a training.

    torchrun --nproc_per_node 2 tests/distributed_cases.py CASES.json

CASES.json is a list of objects: `arguments` of train.py; `log`, the file for what the run prints (with the rank as its
suffix); optionally `second_stage`, whether they are grpo.py's, `copy`, a folder to copy before and where to, and
`terminated`, the rank that gets a SIGTERM.
"""

import pvm  # noqa: F401, I001

import contextlib
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from pvm import grpo, train
from pvm.errors import UserError
from pvm.training.trainer import PVMTrainer


class Terminate(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


class TerminatedTrainer(PVMTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(Terminate())


def run(case: dict, rank: int) -> None:
    if "copy" in case and rank == 0:
        shutil.copytree(*case["copy"])
    torch.distributed.barrier()
    train.PVMTrainer = TerminatedTrainer if case.get("terminated") == rank else PVMTrainer
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            (grpo if case.get("second_stage") else train).main(case["arguments"])
        except (UserError, SystemExit) as error:
            print(f"{type(error).__name__}: {error}")
    Path(f"{case['log']}.{rank}").write_text(output.getvalue())


torch.distributed.init_process_group("gloo")
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    # accelerate shards on GPUs only, so a CPU has to pass for one. FSDP2 itself, and all that accelerate and Trainer
    # do with it, run for real.
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
for case in json.loads(Path(sys.argv[1]).read_text()):
    run(case, torch.distributed.get_rank())
torch.distributed.destroy_process_group()
