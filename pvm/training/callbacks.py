"""Trainer callbacks: stopping on SIGTERM, and the gradient norm of each branch."""

import signal

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling_qwen3vl_pvm import pvm_blocks


class StopOnSigterm(TrainerCallback):
    """
    On SIGTERM (from a scheduler, or when a machine is preempted), saves a checkpoint after the current step and stops.
    A context manager: inside it, SIGTERM does not end the process, so that a save is never cut off.

    stopped (`bool`): whether training was stopped.
    """

    def __init__(self):
        self.stopped = False
        self._received = False

    def __enter__(self):
        self._previous = signal.signal(signal.SIGTERM, self._receive)

    def __exit__(self, *exception):
        signal.signal(signal.SIGTERM, self._previous)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        received = self._received
        if args.world_size > 1:
            # The signal reaches the ranks in different steps, but all must save the same one.
            flag = torch.tensor(int(received), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            received = bool(flag)
        if received and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def _receive(self, signal_number, frame):
        self._received = True


class BranchGradients(TrainerCallback):
    """norms (`dict[int, torch.Tensor]`): of each branch's clipped gradient in the last step, by decoder layer."""

    def __init__(self):
        self.norms: dict[int, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for layer_idx, block in pvm_blocks(model).items():
            gradients = [p.grad for p in block.parameters() if p.grad is not None]
            if gradients:  # DeepSpeed does not keep them in `grad`
                self.norms[layer_idx] = unsharded(torch.nn.utils.get_total_norm(gradients))


def unsharded(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of which this rank may hold only a shard. Must be called on all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
