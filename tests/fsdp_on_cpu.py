"""
train.py for the tests of FSDP: accelerate shards on GPUs only, so here a CPU passes for one. torch's FSDP2 itself, and
all that accelerate and the Trainer do with it, run for real, over gloo.
"""

import pvm  # noqa: F401, I001

import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

import train


torch.distributed.init_process_group("gloo")
PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
train.main(sys.argv[1:])
