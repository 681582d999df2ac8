"""transformers' Trainer for PVM and its controls."""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks, is_deepspeed_zero3_enabled
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import ModelOutput
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, TrainOutput, sort_checkpoints
from transformers.utils import logging

from modeling_qwen3vl_pvm import pvm_blocks
from pvm.checkpoints.card import write_card
from pvm.checkpoints.push import push
from pvm.checkpoints.record import PEFT_ORIGINAL, training_metadata, training_record, write_record
from pvm.data.encoding import IGNORE_INDEX
from pvm.data.streams import ConversationStream
from pvm.errors import UserError, user_errors
from pvm.training.callbacks import BranchGradients, StopOnSigterm, unsharded
from pvm.training.image_dropout import ImageDropout, without_image
from pvm.training.saving import (
    SETTINGS,
    STAGING,
    load_branches,
    no_progress_bar,
    remove,
    save_branches,
    save_float32_branches,
    staged,
)


logger = logging.get_logger(__name__)

# Fields of TrainingArguments that must keep their default, because another value would do nothing, or something other
# than it says; by the reason.
FIXED = {
    "train.py only trains; eval.py evaluates the checkpoints": (
        *("do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
        *("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics"),
        *("per_device_eval_batch_size", "prediction_loss_only", "bf16_full_eval", "fp16_full_eval", "label_names"),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    ),
    "the loss would not be smoothed": ("label_smoothing_factor",),
    "liger-kernel has no kernels for a model with branches, and logits are already computed only where there is a "
    "label": ("use_liger_kernel", "liger_kernel_config"),
    "the columns of the data are not the inputs of the model": ("remove_unused_columns", "length_column_name"),
    "it follows from the method": ("ddp_find_unused_parameters",),
    "SIGTERM always saves the current step": ("enable_jit_checkpoint",),
}


@dataclass
class PVMTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the paper's defaults."""

    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the checkpoints and the result; new, or empty (default `trainer_output`)."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "`last`, or a checkpoint-* folder, with the flags of its run: continue that run exactly. Base and "
            "data may have moved, but must be the same."
        },
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up steps; below 1, a share of all steps."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines; below 1, a share of all."})
    gate_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the gates; by default that of the other weights."}
    )
    image_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Share of the micro-batches in which self-attention does not see the image, and only the branches "
            "do: what makes them learn to carry it (docs/study.md). 0 is the published recipe."
        },
    )
    do_train: bool = field(default=True, metadata={"help": "Leave this true."})
    # Every branch gets a gradient from every batch, so DDP need not search for unused parameters.
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Leave this false."})
    # The data set encodes its rows itself, from columns that no model signature names.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave this false."})

    def __post_init__(self):
        """
        Raises:
            UserError: for a value that would do nothing, something other than it says, or what cannot work.
        """
        reasons = {name: reason for reason, names in FIXED.items() for name in names}
        for known in fields(self):
            name, value = known.name, getattr(self, known.name)
            if name in reasons and value != known.default:
                raise UserError(f"--{name} {str(value).lower()}: {reasons[name]}. Leave it out.")
            if isinstance(value, float | int) and value < 0 and value != known.default:
                raise UserError(f"--{name} {value}: it cannot be negative.")
        if self.save_strategy == "best":
            raise UserError("--save_strategy best: nothing is evaluated during training. Choose steps, epoch or no.")
        # Without an accelerator there is no choice, but transformers would warn, and refuse --bf16, without the flag.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        if (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise UserError(
                "--gradient_checkpointing_kwargs: reentrant checkpointing does not reach weights above frozen layers. "
                "Leave use_reentrant out; the other kind is the default."
            )
        if min(self.per_device_train_batch_size, self.gradient_accumulation_steps) < 1:
            raise UserError("--per_device_train_batch_size and --gradient_accumulation_steps must be at least 1.")
        if self.image_dropout > 1:
            raise UserError(f"--image_dropout {self.image_dropout:g}: it is a share, between 0 and 1.")
        if self.max_steps == 0:
            raise UserError("--max_steps 0 would train nothing. Leave it out or give a number of steps.")
        if self.n_gpu > 1:
            raise UserError(
                f"One process sees {self.n_gpu} GPUs. Start one process for each: accelerate launch --config_file "
                "recipes/accelerate/ddp.yaml -m pvm train ..., or choose one GPU with CUDA_VISIBLE_DEVICES=0."
            )
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise UserError(
                f"--hub_strategy {self.hub_strategy.value} would push the optimizer's state, which is a pickle. "
                "Choose every_save or end."
            )
        if self.fp16 and self.device.type == "cpu":
            raise UserError("--fp16 does nothing on a CPU. Leave it out or use --bf16.")
        with user_errors("--report_to"):  # before the model is loaded
            for integration in get_reporting_integration_callbacks(self.report_to):
                integration()


class _AllLoaded(Exception):
    """See [`_StopBeforeTraining`]."""


class _StopBeforeTraining(TrainerCallback):
    """Leaves `Trainer.train` once the model is wrapped for its devices and the checkpoint loaded."""

    def on_train_begin(self, args, state, control, **kwargs):
        raise _AllLoaded


class CheckpointingTrainer(Trainer):
    """
    What the trainers of both stages share: checkpoints, resuming, the log of the branches.

    - A checkpoint holds what was trained, in the backbone's dtype, and all that is needed to load and push it: config,
      code files, processor, card. Branches that train in float32 over another dtype are also kept in float32 for
      resuming, so that a resumed run continues exactly where it stopped.
    - A checkpoint appears under its name only when it is complete.

    Private methods of `Trainer` that are overridden, because there is no public way:

    - `_get_output_dir`, `_save_checkpoint`: a checkpoint is written in a staging folder and published when complete.
    - `_push_from_checkpoint`: pushed after that, and as a folder of its own.
    - `_load_from_checkpoint`: `Trainer` does not know the files of an adapter checkpoint.

    Args:
        settings (`dict[str, Any]`): [`run_settings`], or at least `method`; saved in every checkpoint, for a resumed
            run to compare.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *args, settings: dict[str, Any], **kwargs):
        quantized = "quantization_config" in model.config.to_dict()
        # Trainer assumes that nothing trains in a quantised model unless peft put it there.
        model.is_quantized = False
        super().__init__(model, *args, **kwargs)
        model.is_quantized = quantized
        # Trainer sets this to turn the cache off. The model does not read it, and every config.json would have it.
        del model.config.use_cache
        if self.processing_class is not None:
            # Trainer would do the same, and warn: Qwen's config has no pad token.
            model.config.get_text_config().pad_token_id = self.processing_class.tokenizer.pad_token_id
        self.settings = settings
        self.stop_on_sigterm, self.branch_gradients = StopOnSigterm(), BranchGradients()
        self.add_callback(self.stop_on_sigterm)
        self.add_callback(self.branch_gradients)
        if self.is_fsdp_enabled:
            # Branches are sharded as units of their own, because they may be float32 in a bf16 decoder layer. Not the
            # blocks of the vision tower: a rank whose batch has no image does not run them, and the others would wait
            # for it forever.
            units = [module for module in self.model.modules() if isinstance(module, Qwen3VLTextDecoderLayer)]
            units += pvm_blocks(self.model).values()
            names = sorted({type(unit).__name__ for unit in units})
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = names

    def train(self, resume_from_checkpoint: str | None = None, **kwargs) -> TrainOutput | None:
        """As `Trainer`; but a checkpoint of a run that has made all its steps is only loaded."""
        if resume_from_checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            if state.global_step >= (self.args.max_steps if self.args.max_steps > 0 else state.max_steps):
                # Trainer would make one more step.
                self.add_callback(_StopBeforeTraining())
                with suppress(_AllLoaded):
                    super().train(resume_from_checkpoint, **kwargs)
                return None
        return super().train(resume_from_checkpoint, **kwargs)

    @user_errors("The optimizer cannot be created")
    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.args.gate_learning_rate is None or self.optimizer is not None:
            return super().create_optimizer(model)
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        weights = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        gates = [p for name, p in weights if name.endswith(".gate_alpha")]
        if not gates:
            raise UserError(
                f"--gate_learning_rate belongs to --method pvm, and the method is {self.settings['method']}."
            )
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

    @user_errors("The learning rate schedule cannot be created")
    def create_scheduler(self, *args, **kwargs) -> torch.optim.lr_scheduler.LRScheduler:
        return super().create_scheduler(*args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add each branch's gate and the norm of its gradient to every logged loss."""
        if "loss" in logs and not is_deepspeed_zero3_enabled():  # which hides parameters outside of a step
            for layer_idx, block in pvm_blocks(self.model).items():
                logs[f"gate/layer_{layer_idx}"] = round(unsharded(block.gate_alpha).item(), 6)
            for layer_idx, norm in self.branch_gradients.norms.items():
                logs[f"grad_norm/layer_{layer_idx}"] = norm.item()
        super().log(logs, *args, **kwargs)

    def frozen_hash(self) -> str | None:
        """
        SHA-256 over names, dtypes and bytes of everything that is frozen. Must be called on all ranks. `None` if
        everything trains, and with ZeRO-3, which hides parameters outside of a step.
        """
        if is_deepspeed_zero3_enabled():
            return None
        trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        if all(parameter.requires_grad for parameter in self.model.parameters()):
            return None
        digest = hashlib.sha256()
        # The state dict, not the parameters: bitsandbytes changes the layout of those when they are first used.
        for name, values in self.model.state_dict().items():
            if name not in trainable and PEFT_ORIGINAL not in name:
                values = unsharded(values).cpu().contiguous()
                digest.update(f"{name} {values.dtype}".encode())
                digest.update(values.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what was trained, with record and card. Does not push."""
        if _internal_call:  # part of a checkpoint, which is staged as a whole
            return self._write_model(Path(output_dir))
        with staged(Path(output_dir or self.args.output_dir), self.accelerator, self.args.should_save) as staging:
            self._write_model(staging)

    @property
    def saves_branches_only(self) -> bool:
        """Whether the language model around the branches is frozen, but for LoRA: its weights are the base's."""
        return bool(pvm_blocks(self.model)) and not self.model.get_input_embeddings().weight.requires_grad

    @no_progress_bar()
    def _write_model(self, folder: Path) -> None:
        model = self.model_wrapped if self.is_deepspeed_enabled else self.model
        state_dict = self.accelerator.get_state_dict(model)  # on all ranks, each of which may hold a shard
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        record = training_record(self.model, self.settings, self.state)
        if self.saves_branches_only:
            save_branches(folder, self.model, state_dict, record)
        else:
            if pvm_blocks(self.model):
                self.model.config.get_text_config().pvm_training = training_metadata(record)
            self.model.save_pretrained(folder, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        write_record(folder, record)
        write_card(folder, self.hub_model_id or Path(self.args.output_dir).name)

    def _get_output_dir(self, trial) -> str:
        return str(Path(self.args.output_dir) / STAGING)

    def _save_checkpoint(self, model, trial) -> None:
        run_dir, step = Path(self.args.output_dir), self.state.global_step
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        with staged(run_dir, self.accelerator, self.args.should_save) as staging:
            super()._save_checkpoint(model, trial)
            if self.args.should_save and not self.args.save_only_model:
                (staging / name / SETTINGS).write_text(json.dumps(self.settings, indent=2))
                if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # whose files keep every weight's dtype
                    save_float32_branches(staging / name, self.model)
        if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END and self.is_world_process_zero():
            try:
                self._push(run_dir / name, f"Training in progress, step {step}")
            except UserError:
                raise
            except Exception as error:  # no failure of a network may end hours of training
                logger.warning(f"Step {step} is saved but could not be pushed; training goes on. {error}")
        if self.args.should_save and self.args.save_total_limit:
            for old in sort_checkpoints(str(run_dir))[: -self.args.save_total_limit]:
                remove(Path(old))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.saves_branches_only and not self.is_fsdp_enabled:
            load_branches(Path(resume_from_checkpoint), self.model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing yet: `_save_checkpoint` pushes once the checkpoint is complete."""

    def push_to_hub(self, commit_message: str = "End of training", **kwargs) -> None:
        """Push what is saved in the output folder as one commit."""
        if self.is_world_process_zero():
            self._push(Path(self.args.output_dir), commit_message)

    def _push(self, folder: Path, commit_message: str) -> None:
        push(folder, self.hub_model_id, commit_message, self.args.hub_revision, self.args.hub_token)


class PVMTrainer(CheckpointingTrainer):
    """
    Trains any of the methods on conversations.

    - The loss is the mean over all labels of a step, across micro-batches and ranks.
    - Logits are computed only at the tokens that predict a label: with a vocabulary of 151,936 the others would take
      most of the memory.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, compute_loss_func=loss_of_predictions, **kwargs)
        self.image_dropout = ImageDropout(self.args.image_dropout, self.args.seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.image_dropout(self.state.global_step):
            inputs = without_image(self.accelerator.unwrap_model(model), inputs)
        positions, targets = predictions(inputs["labels"])
        inputs = {**inputs, "labels": targets, "logits_to_keep": positions, "use_cache": False}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @user_errors("The rows cannot be batched")
    def get_train_dataloader(self) -> DataLoader:
        """Rows in random order as in `Trainer`; those of a stream as they arrive."""
        if not isinstance(self.train_dataset, ConversationStream):
            loader = super().get_train_dataloader()
            if len(loader) == 0:
                raise UserError("--dataloader_drop_last: there are fewer rows than one batch. Leave it out.")
            return loader
        if self.args.train_sampling_strategy != "random":
            raise UserError(
                "--train_sampling_strategy needs all rows at once, and --streaming reads one after another. Leave it "
                "out; --shuffle_buffer_size 1 keeps the order of the rows."
            )
        # Each rank's stream is already its own share. accelerate would divide it again, or read on one rank and split
        # batches along their first dimension, which differs between pixels and tokens.
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


def predictions(labels: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
    """
    The positions at which any row predicts a label, and the labels.

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
