"""transformers' Trainer with what PVM needs: a learning rate for gates, gates in the log, exact resumes."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from .data import ConversationStream
from .errors import UserError
from .methods import pvm_blocks


# The float32 branches of a run over a backbone of another dtype, beside the optimizer's state: for resuming only.
MASTER_WEIGHTS = "pvm_float32.safetensors"


@dataclass
class PVMTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments; the defaults that differ are the paper's."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up steps; below 1, their share of all steps."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    gate_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the gates, if not that of the other weights."}
    )
    # The data set makes model inputs itself, from columns that no model signature names.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave this false."})


class PVMTrainer(Trainer):
    """
    Trains any of the methods. `method` (`str`) is written into the mark of PVM checkpoints.

    Checkpoints are complete: weights in the backbone's dtype, config, code files, processor. Where the branches train
    in float32 over another dtype, their float32 weights are kept beside the optimizer's state, so that a resumed run
    goes on exactly where it stopped.
    """

    def __init__(self, *args, method: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.method = method

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.args.gate_learning_rate is None or self.optimizer is not None:
            return super().create_optimizer(model)
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        weights = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        gates = [p for name, p in weights if name.endswith(".gate_alpha")]
        if not gates:
            raise UserError(f"--gate_learning_rate belongs to --method pvm, and the method is {self.method}.")
        rest = [(name, p) for name, p in weights if not name.endswith(".gate_alpha")]
        optimizer_class, optimizer_kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(
            [
                {"params": [p for name, p in rest if name in decayed], "weight_decay": self.args.weight_decay},
                {"params": [p for name, p in rest if name not in decayed], "weight_decay": 0.0},
                {"params": gates, "weight_decay": 0.0, "lr": self.args.gate_learning_rate},
            ],
            **optimizer_kwargs,
        )
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Rows in random order, as `Trainer` makes it; those of a stream as they come."""
        if not isinstance(self.train_dataset, ConversationStream):
            return super().get_train_dataloader()
        # Each rank's stream is its own share already. accelerate would share it out once more, or let one rank read
        # for all and cut batches along their first dimension, which is another one for pixels than for tokens.
        return DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Every logged loss comes with the value of each layer's gate."""
        if "loss" in logs:
            for layer_idx, block in pvm_blocks(self.model).items():
                logs[f"gate/layer_{layer_idx}"] = round(block.gate_alpha.item(), 6)
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if pvm_blocks(self.model):
            mark = {"method": self.method, "step": self.state.global_step}
            self.model.config.get_text_config().pvm_training = mark
            state_dict = self.model.state_dict() if state_dict is None else state_dict
            state_dict = {
                name: weight.to(self.model.dtype) if ".pvm_block." in name else weight
                for name, weight in state_dict.items()
            }
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        masters = {
            name: weight for name, weight in self.model.state_dict().items() if weight.dtype != self.model.dtype
        }
        masters = {name: weight.contiguous() for name, weight in masters.items() if ".pvm_block." in name}
        if masters and self.args.should_save:
            save_file(masters, Path(output_dir) / MASTER_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        masters = Path(resume_from_checkpoint) / MASTER_WEIGHTS
        if masters.is_file():
            (self.model if model is None else model).load_state_dict(load_file(masters), strict=False)
