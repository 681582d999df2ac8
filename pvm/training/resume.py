"""Resuming a run: from which checkpoint, and only with the same settings, data and base."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from pvm.checkpoints.names import stored_config
from pvm.data.encoding import processor_state
from pvm.data.sources import DataArguments
from pvm.data.validation import REPORTS
from pvm.errors import UserError
from pvm.files import LOCK
from pvm.training.methods import ModelArguments, base_model
from pvm.training.saving import SETTINGS, STAGING


# Settings that only name what is compared by its content: it may have moved, or something else have its name.
NAMES = ("model_name_or_path", "model_revision", "base_model_id", "base_model", "base_revision", "dataset_name")
# Settings that checkpoints of earlier versions do not know.
LATER = (
    *("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "max_grad_norm", "lr_scheduler_kwargs"),
    *("neftune_noise_alpha", "average_tokens_across_devices"),
    *("data_seed", "train_sampling_strategy", "dataloader_drop_last", "ignore_data_skip"),
)
# Fields of a config.json that do not change what the model computes.
NOT_COMPARED = ("transformers_version", "_name_or_path", "base_model_name_or_path", "base_model_revision")


def find_checkpoint(arguments: TrainingArguments, settings: dict[str, Any]) -> str | None:
    """
    The checkpoint to resume from; `None` for a new run.

    Args:
        settings (`dict[str, Any]`): of this run, see [`run_settings`].

    Raises:
        UserError: if the checkpoint that is asked for does not exist or belongs to another run, or if a new run would
            overwrite an old one.
    """
    output_dir, resume = Path(arguments.output_dir), arguments.resume_from_checkpoint
    last = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
    if resume == "last" and last is None:
        raise UserError(f"--resume_from_checkpoint last: {output_dir} has no checkpoint. Leave the flag out.")
    resume = last if resume == "last" else resume
    if resume is not None:
        _check_resume(Path(resume), arguments, settings)
        if Path(resume).resolve().parent == output_dir.resolve():
            return resume
    leftovers = (LOCK, STAGING, *REPORTS)
    if output_dir.is_dir() and any(
        file.name not in leftovers and not file.match("skipped_rows-*.jsonl") for file in output_dir.iterdir()
    ):
        raise UserError(
            f"{output_dir} is not empty, and a new run would overwrite its files. Choose another --output_dir, "
            + ("or resume with --resume_from_checkpoint last." if last else "or delete it.")
        )
    return resume


def _check_resume(checkpoint: Path, arguments: TrainingArguments, settings: dict[str, Any]) -> None:
    """Refuse to resume from anything but a complete checkpoint of this run."""
    flag = f"--resume_from_checkpoint {checkpoint}"
    if not checkpoint.is_dir():
        raise UserError(f"{flag}: no such folder. Name a checkpoint, or write `last`.")
    missing = [name for name in (TRAINER_STATE_NAME, "scheduler.pt", SETTINGS) if not (checkpoint / name).is_file()]
    if missing:
        raise UserError(
            f"{flag}: it has no {missing[0]}, so a run cannot be resumed from it. Name a checkpoint-* folder of a run "
            "without --save_only_model, or start a new run from this model with --model_name_or_path."
        )
    try:
        before = dict(json.loads((checkpoint / SETTINGS).read_text()))
        step = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{flag}: its {SETTINGS} or {TRAINER_STATE_NAME} is broken ({error}). Resume from an earlier checkpoint."
        ) from error
    by_content = NAMES if "content" in before else ()  # an earlier version did not record it
    for key, value in settings.items():
        if key in by_content or (key in LATER and key not in before):
            continue
        if before.get(key) != value:
            raise UserError(
                f"{flag}: that run had --{key} {before.get(key)}, and this one has {value}. Use the same value, or "
                "start a new run in another --output_dir."
            )
    if 0 < arguments.max_steps < step:
        raise UserError(f"{flag} is at step {step}, beyond --max_steps {arguments.max_steps}.")


def check_content(checkpoint: str | None, content: dict[str, str | None]) -> None:
    """
    Refuse to continue a run with other data or another base.

    Args:
        checkpoint (`str`, *optional*): the one to resume from, see [`find_checkpoint`].
        content (`dict[str, str | None]`): a fingerprint of each part of data and base, by its name in messages; `None`
            if there is none. Parts that the checkpoint does not know are not compared.

    Raises:
        UserError: naming the part that differs.
    """
    if checkpoint is None:
        return
    before = json.loads((Path(checkpoint) / SETTINGS).read_text()).get("content", {})
    for part, fingerprint in content.items():
        if None not in (fingerprint, before.get(part)) and before[part] != fingerprint:
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: {part} differ from those of that run (then {before[part]}, "
                f"now {fingerprint}). Use what that run used, or start a new run in another --output_dir."
            )


def base_fingerprints(arguments: ModelArguments, processor: ProcessorMixin) -> dict[str, str]:
    """What the files of the base say, wherever they are, for [`check_content`]; the weights must be loaded first."""
    config = stored_config(arguments.model_name_or_path, arguments.model_revision)
    config = json.dumps({key: value for key, value in config.items() if key not in NOT_COMPARED}, sort_keys=True)
    return {
        "the settings in the config.json of the base": hashlib.sha256(config.encode()).hexdigest(),
        "the settings of the processor of the base": hashlib.sha256(processor_state(processor).encode()).hexdigest(),
    }


def run_settings(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> dict[str, Any]:
    """The settings that a resumed run must share with the original one, as JSON values: run.json."""
    settings = {**asdict(model_args), "model_name_or_path": str(Path(model_args.model_name_or_path))}
    settings["base_model"], settings["base_revision"] = base_model(model_args)
    for key in ("dataset_name", "dataset_config", "dataset_split", "dataset_weights", "max_samples", "train_on"):
        settings[key] = asdict(data_args)[key]
    settings |= {key: asdict(data_args)[key] for key in ("stopping_strategy", "streaming", "max_length")}
    for key in ("learning_rate", "gate_learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "seed"):
        settings[key] = training_args.to_dict()[key]
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16", "optim"):
        settings[key] = training_args.to_dict()[key]
    for key in ("image_dropout", *LATER):
        settings[key] = training_args.to_dict()[key]
    if data_args.streaming:  # the order of a stream depends on these
        settings["shuffle_buffer_size"] = data_args.shuffle_buffer_size
        settings["dataloader_num_workers"] = training_args.dataloader_num_workers
    return {**settings, "num_processes": training_args.world_size}
