"""transformers' Trainer with what PVM needs: cheap logits, a rate for gates, gates in the log, exact resumes."""

import copy
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks, is_deepspeed_zero3_enabled
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import ModelOutput
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, sort_checkpoints
from transformers.utils import logging

from configuration_qwen3vl_pvm import ADAPTER_WEIGHTS_NAME
from modeling_qwen3vl_pvm import Qwen3VLPVMBlock, pvm_blocks
from pvm.checkpoints.card import write_card
from pvm.checkpoints.push import push
from pvm.checkpoints.record import PEFT_ORIGINAL, write_record
from pvm.data.encoding import IGNORE_INDEX, ConversationStream
from pvm.errors import UserError, user_errors
from pvm.training.callbacks import BranchGradients, StopOnSigterm, whole


logger = logging.get_logger(__name__)

LORA_FOLDER = "lora"
# What peft puts before the names of a model's weights.
PEFT_PREFIX = "base_model.model."
# The float32 branches of a run over a backbone of another dtype, beside the optimizer's state: for resuming only.
MASTER_WEIGHTS = "pvm_float32.safetensors"
# What FSDP gathers one at a time.
SHARDED_APART = (Qwen3VLTextDecoderLayer, Qwen3VLPVMBlock)
# Where everything is written first. Only what is whole is moved out of it.
STAGING = ".incomplete"
# What a run was started with, in each of its checkpoints.
SETTINGS = "run.json"
# Fields of TrainingArguments that stay at their default, because another value would do nothing, or something else
# than it says; by the reason.
FIXED = {
    "train.py only trains; eval.py evaluates the checkpoints": (
        *("do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
        *("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics"),
        *("per_device_eval_batch_size", "prediction_loss_only", "bf16_full_eval", "fp16_full_eval", "label_names"),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    ),
    "the loss would not be smoothed": ("label_smoothing_factor",),
    "liger-kernel chooses its kernels by model type and has none for a model with branches; logits are computed only "
    "where there is a label in any case": ("use_liger_kernel", "liger_kernel_config"),
    "rows have other columns than the model has inputs": ("remove_unused_columns", "length_column_name"),
    "it follows from the method": ("ddp_find_unused_parameters",),
    "SIGTERM saves the current step in any case": ("enable_jit_checkpoint",),
}


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
    do_train: bool = field(default=True, metadata={"help": "Leave this true."})
    # Every branch gets a gradient from every batch, so DDP need not look for those that got none.
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Leave this false."})
    # The data set makes model inputs itself, from columns that no model signature names.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave this false."})

    def __post_init__(self):
        reasons = {name: reason for reason, names in FIXED.items() for name in names}
        for known in fields(self):
            name, value = known.name, getattr(self, known.name)
            if name in reasons and value != known.default:
                raise UserError(f"--{name} {str(value).lower()}: {reasons[name]}. Leave it out.")
            if isinstance(value, float | int) and value < 0 and value != known.default:
                raise UserError(f"--{name} {value}: it cannot be negative.")
        if self.save_strategy == "best":
            raise UserError("--save_strategy best: what is best shows in eval.py only. Choose steps, epoch or no.")
        super().__post_init__()
        if min(self.per_device_train_batch_size, self.gradient_accumulation_steps) < 1:
            raise UserError("--per_device_train_batch_size and --gradient_accumulation_steps must be at least 1.")
        if self.max_steps == 0:
            raise UserError("--max_steps 0: there would be nothing to train. Leave it out, or name a number.")
        if self.n_gpu > 1:
            raise UserError(
                f"One process sees {self.n_gpu} GPUs. Start one for each: accelerate launch --config_file "
                "recipes/accelerate/ddp.yaml train.py ..., or show it one with CUDA_VISIBLE_DEVICES=0."
            )
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise UserError(
                f"--hub_strategy {self.hub_strategy.value} would push the optimizer's state, which is a pickle. Take "
                "every_save or end."
            )
        if self.fp16 and self.device.type == "cpu":
            raise UserError("--fp16 does nothing on a CPU. Leave it out, or take --bf16.")
        with user_errors("--report_to"):  # here, not after the model has been loaded
            for integration in get_reporting_integration_callbacks(self.report_to):
                integration()


class PVMTrainer(Trainer):
    """
    Trains any of the methods. `method` (`str`) is written into the mark of PVM checkpoints, `settings` (`dict`) into
    each checkpoint, for a resumed run to compare.

    - The loss is the mean over the labels of a whole step, over all micro-batches and ranks.
    - Logits are computed only at the tokens that predict a label: with a vocabulary of 151,936 the others would be
      most of a short answer's memory.
    - Checkpoints hold what was trained, in the backbone's dtype, and all that it takes to load and push it: config,
      code files, processor, card. Where the branches train in float32 over another dtype, their float32 weights are
      kept beside the optimizer's state, so that a resumed run goes on exactly where it stopped.
    - A checkpoint appears under its name only when it is whole, whatever happens during the save.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *args,
        method: str,
        settings: dict[str, Any] | None = None,
        **kwargs,
    ):
        quantized = "quantization_config" in model.config.to_dict()
        # The Trainer believes that nothing trains in a quantised model unless peft put it there.
        model.is_quantized = False
        super().__init__(model, *args, compute_loss_func=loss_of_predictions, **kwargs)
        model.is_quantized = quantized
        # The Trainer's way to turn the cache off, which this model does not read and its checkpoints would tell on.
        del model.config.use_cache
        self.method, self.settings = method, settings
        self.stop_on_sigterm, self.branch_gradients = StopOnSigterm(), BranchGradients()
        self.add_callback(self.stop_on_sigterm)
        self.add_callback(self.branch_gradients)
        if self.is_fsdp_enabled:
            # Branches apart, because they may be float32 over a bf16 decoder. Not the vision tower's blocks: a rank
            # whose batch has no image does not run them, and the others would wait for it forever.
            apart = {type(m).__name__ for m in self.model.modules() if isinstance(m, SHARDED_APART)}
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(apart)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        positions, targets = predictions(inputs["labels"])
        inputs = {**inputs, "labels": targets, "logits_to_keep": positions, "use_cache": False}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @user_errors("The optimizer cannot be made")
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

    @user_errors("The learning rate schedule cannot be made")
    def create_scheduler(self, *args, **kwargs) -> torch.optim.lr_scheduler.LRScheduler:
        return super().create_scheduler(*args, **kwargs)

    @user_errors("The rows cannot be made into batches")
    def get_train_dataloader(self) -> DataLoader:
        """Rows in random order, as `Trainer` makes it; those of a stream as they come."""
        if not isinstance(self.train_dataset, ConversationStream):
            loader = super().get_train_dataloader()
            if len(loader) == 0:
                raise UserError("--dataloader_drop_last: there are fewer rows than one batch. Leave it out.")
            return loader
        if self.args.train_sampling_strategy != "random":
            raise UserError(
                "--train_sampling_strategy needs all rows at hand, and --streaming reads one after the other. Leave "
                "it out; --shuffle_buffer_size 1 keeps their order."
            )
        # Each rank's stream is its own share already. accelerate would share it out once more, or let one rank read
        # for all and cut batches along their first dimension, which is another one for pixels than for tokens.
        return DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
        )

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Every logged loss comes with each branch's gate and the norm of its gradient."""
        if "loss" in logs and not is_deepspeed_zero3_enabled():  # which hides parameters outside of a step
            for layer_idx, block in pvm_blocks(self.model).items():
                logs[f"gate/layer_{layer_idx}"] = round(whole(block.gate_alpha).item(), 6)
            for layer_idx, norm in self.branch_gradients.norms.items():
                logs[f"grad_norm/layer_{layer_idx}"] = norm.item()
        super().log(logs, *args, **kwargs)

    def frozen_hash(self) -> str | None:
        """
        SHA-256 over names, dtypes and bytes of everything that does not train; to be called on all ranks. `None` if
        everything trains, and with ZeRO-3, which hides parameters outside of a step.
        """
        if is_deepspeed_zero3_enabled():
            return None
        trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        if all(parameter.requires_grad for parameter in self.model.parameters()):
            return None
        digest = hashlib.sha256()
        # Not the parameters themselves: bitsandbytes lays those out anew for the machine when they are first used.
        for name, values in self.model.state_dict().items():
            if name not in trainable and PEFT_ORIGINAL not in name:
                values = whole(values).cpu().contiguous()
                digest.update(f"{name} {values.dtype}".encode())
                digest.update(values.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:  # part of a checkpoint, which is staged as a whole
            return super().save_model(output_dir, _internal_call)
        output_dir = Path(output_dir or self.args.output_dir)
        with self._staged(output_dir) as staging:
            super().save_model(str(staging), _internal_call=True)
        if self.args.push_to_hub:
            self.push_to_hub()

    def _get_output_dir(self, trial) -> str:
        """Where `_save_checkpoint` puts `checkpoint-*`."""
        return str(Path(super()._get_output_dir(trial)) / STAGING)

    def _save_checkpoint(self, model, trial) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        with self._staged(run_dir):
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END and self.is_world_process_zero():
            step = self.state.global_step
            try:
                self._push(run_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}", f"Training in progress, step {step}")
            except UserError:
                raise
            except Exception as error:  # whatever a network can do must not end hours of training
                logger.warning(f"Step {step} is saved but could not be pushed; training goes on. {error}")
        if self.args.should_save and self.args.save_total_limit:
            for old in sort_checkpoints(str(run_dir))[: -self.args.save_total_limit]:
                _remove(Path(old))

    @contextmanager
    def _staged(self, folder: Path):
        """What is written into the folder that this yields is in `folder` afterwards, whole, or not at all."""
        staging = folder / STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # what an interrupted run left
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        yield staging
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for path in (*staging.rglob("*"), staging):
                _flush(path)  # or after a power cut there might be names without contents
            # Nothing loads a model without its config.json, so it comes last.
            for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
                target = folder / path.name
                if target.is_dir():
                    _remove(target)
                os.replace(path, target)
            _flush(folder)
            shutil.rmtree(staging)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Only what was trained, if that is branches; else as `Trainer` does it."""
        if pvm_blocks(self.model):
            if self.args.should_save:
                self._save_adapter(Path(output_dir), self.model.state_dict() if state_dict is None else state_dict)
        else:
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            # A pickle, with paths of this machine; what a checkpoint needs of the arguments is in its run.json.
            (Path(output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            write_record(Path(output_dir), self.model, self.settings, self.state)
            write_card(Path(output_dir), self.hub_model_id or Path(self.args.output_dir).name)

    def _save_adapter(self, output_dir: Path, state_dict: dict[str, torch.Tensor]) -> None:
        """The branches in the backbone's dtype and, with LoRA, its adapter in a folder of its own."""
        model, lora = self.model, {}
        if isinstance(model, PeftModel):
            state_dict = {
                name.removeprefix(PEFT_PREFIX): weight
                for name, weight in get_peft_model_state_dict(model, state_dict, save_embedding_layers=False).items()
            }
            lora = {name: weight for name, weight in state_dict.items() if ".pvm_block." not in name}
            model = model.get_base_model()
        config, base = model.config, model.config.base_model_name_or_path
        config.get_text_config().pvm_training = {
            "method": self.method,
            "step": self.state.global_step,
            "base_model": None if Path(base).is_dir() else base,
            "base_revision": config.base_model_revision,
        }
        config.peft_adapter = LORA_FOLDER if lora else None
        branches = {name: weight.to(model.dtype) for name, weight in state_dict.items() if ".pvm_block." in name}
        model.save_pretrained(output_dir, state_dict=branches, adapter_only=True)
        if lora:
            lora_config = copy.copy(self.model.peft_config["default"])
            lora_config.base_model_name_or_path, lora_config.modules_to_save = base, None
            lora_config.inference_mode = True
            lora_config.save_pretrained(output_dir / LORA_FOLDER)
            lora = {PEFT_PREFIX + name: weight.contiguous() for name, weight in lora.items()}
            save_file(lora, output_dir / LORA_FOLDER / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.settings is not None and self.args.should_save:
            Path(output_dir, SETTINGS).write_text(json.dumps(self.settings, indent=2))
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return  # what they save to resume from has every weight in its own dtype
        branches = self._trained_branches()
        masters = {name: weight for name, weight in branches.items() if weight.dtype != self.model.dtype}
        if masters and self.args.should_save:
            save_file(masters, Path(output_dir) / MASTER_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        if not pvm_blocks(self.model) or self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        weights = load_file(checkpoint / ADAPTER_WEIGHTS_NAME)
        if (checkpoint / MASTER_WEIGHTS).is_file():
            weights |= load_file(checkpoint / MASTER_WEIGHTS)
        if not isinstance(self.model, PeftModel):
            self.model.load_state_dict(weights, strict=False)
            return
        weights = {PEFT_PREFIX + name: weight for name, weight in weights.items()}
        weights |= load_file(checkpoint / LORA_FOLDER / SAFETENSORS_WEIGHTS_NAME)
        set_peft_model_state_dict(self.model, weights)

    def _trained_branches(self) -> dict[str, torch.Tensor]:
        """The branches' weights under the names that they have without peft."""
        state_dict = self.model.state_dict()
        if isinstance(self.model, PeftModel):
            state_dict = get_peft_model_state_dict(self.model, state_dict, save_embedding_layers=False)
        return {
            name.removeprefix(PEFT_PREFIX): weight.contiguous()
            for name, weight in state_dict.items()
            if ".pvm_block." in name
        }

    def create_model_card(self, *args, **kwargs) -> None:
        """Ours is written with every save."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing yet: `_save_checkpoint` pushes when the checkpoint has its name."""

    def push_to_hub(self, commit_message: str = "End of training", **kwargs) -> None:
        """Push what is saved in the output folder, as one commit."""
        if self.is_world_process_zero():
            self._push(Path(self.args.output_dir), commit_message)

    def _push(self, folder: Path, commit_message: str) -> None:
        push(folder, self.hub_model_id, commit_message, self.args.hub_revision, self.args.hub_token)


def _flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Delete a folder so that what is left of it, should this be interrupted, does not have its name."""
    doomed = folder.parent / STAGING / f"{folder.name}-old"
    doomed.parent.mkdir(exist_ok=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def predictions(labels: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
    """
    Where a label is predicted, and which.

    Args:
        labels (`torch.LongTensor` `[batch, sequence]`): -100 where there is none.

    Returns:
        The positions `[n]` whose next token has a label in any row, and those labels, `[batch, n]`.
    """
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    positions = (targets != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
    return positions, targets[:, positions]


def loss_of_predictions(
    outputs: ModelOutput, targets: torch.LongTensor, num_items_in_batch: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Cross-entropy of `outputs.logits` `[batch, n, vocabulary]` and `targets` `[batch, n]`: the sum over
    `num_items_in_batch`, or the mean.
    """
    logits = outputs.logits
    return ForCausalLMLoss(logits, None, logits.shape[-1], num_items_in_batch, shift_labels=targets)
