"""What happens around training steps: stopping when the machine asks for it, and what the branches' gradients are."""

import signal

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling_qwen3vl_pvm import pvm_blocks


class StopOnSigterm(TrainerCallback):
    """
    On SIGTERM (a scheduler's warning, a preempted machine) saves a checkpoint after the current step and stops. A
    context: inside of it the signal ends nothing, so that what is being saved is saved.

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
            # Ranks get the signal in different steps, and must save the same one.
            flag = torch.tensor(int(received), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            received = bool(flag)
        if received and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def _receive(self, signal_number, frame):
        self._received = True


class AllLoaded(Exception):
    """See [`StopBeforeTraining`]."""


class StopBeforeTraining(TrainerCallback):
    """
    Leaves `Trainer.train`, by an `AllLoaded`, when the model has been wrapped for its devices and the checkpoint
    loaded. From a checkpoint of the last step `Trainer` would make one more.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        raise AllLoaded


class BranchGradients(TrainerCallback):
    """norms (`dict[int, torch.Tensor]`): norm of each branch's clipped gradient in the last step, by layer."""

    def __init__(self):
        self.norms: dict[int, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for layer_idx, block in pvm_blocks(model).items():
            gradients = [p.grad for p in block.parameters() if p.grad is not None]
            if gradients:  # DeepSpeed keeps them elsewhere
                self.norms[layer_idx] = whole(torch.nn.utils.get_total_norm(gradients))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of which this rank holds a part; to be called on all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
