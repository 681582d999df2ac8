"""Checkpoints on disk: what they hold, and that they appear under their names only when they are complete."""

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from adapter_qwen3vl_pvm import ADAPTER_WEIGHTS_NAME
from pvm.checkpoints.record import training_metadata
from pvm.errors import UserError
from pvm.files import locked


LORA_FOLDER = "lora"
# The prefix that peft puts before the names of a model's weights.
PEFT_PREFIX = "base_model.model."
# Float32 branches of a run over a backbone of another dtype. Only for resuming, like the optimizer's state.
MASTER_WEIGHTS = "pvm_float32.safetensors"
# The settings of the run, in each of its checkpoints: see `run_settings`.
SETTINGS = "run.json"
# Everything is written in this folder first, and moved out of it when complete.
STAGING = ".incomplete"


def save_branches(
    folder: Path, model: PreTrainedModel | PeftModel, state_dict: dict[str, torch.Tensor], record: dict[str, Any]
) -> None:
    """
    Save an adapter checkpoint: the branches in the backbone's dtype and, of a PEFT model, LoRA in a folder of its own.

    Args:
        state_dict (`dict[str, torch.Tensor]`): of the model, gathered from all ranks.
        record (`dict[str, Any]`): [`training_record`], of which the config gets the training metadata.
    """
    branches, lora = _trained_weights(model, state_dict)
    plain_model = model.get_base_model() if isinstance(model, PeftModel) else model
    config = plain_model.config
    config.get_text_config().pvm_training = training_metadata(record)
    config.peft_adapter = LORA_FOLDER if lora else None
    branches = {name: weight.to(plain_model.dtype) for name, weight in branches.items()}
    plain_model.save_pretrained(folder, state_dict=branches, adapter_only=True)
    if lora:
        lora_config = copy.copy(model.peft_config["default"])
        lora_config.base_model_name_or_path, lora_config.modules_to_save = config.base_model_name_or_path, None
        lora_config.inference_mode = True
        lora_config.save_pretrained(folder / LORA_FOLDER)
        save_file(lora, folder / LORA_FOLDER / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def save_float32_branches(folder: Path, model: PreTrainedModel | PeftModel) -> None:
    """Save the branches once more as they train, in float32, if `save_branches` rounds them to another dtype."""
    branches, _ = _trained_weights(model, model.state_dict())
    masters = {name: weight for name, weight in branches.items() if weight.dtype != model.dtype}
    if masters:
        save_file(masters, folder / MASTER_WEIGHTS)


def load_branches(folder: Path, model: PreTrainedModel | PeftModel) -> None:
    """Load the branches of a checkpoint to resume from, in float32 if they train so, and LoRA of a PEFT model."""
    weights = load_file(folder / ADAPTER_WEIGHTS_NAME)
    if (folder / MASTER_WEIGHTS).is_file():
        weights |= load_file(folder / MASTER_WEIGHTS)
    if isinstance(model, PeftModel):
        weights = {PEFT_PREFIX + name: weight for name, weight in weights.items()}
        weights |= load_file(folder / LORA_FOLDER / SAFETENSORS_WEIGHTS_NAME)
        set_peft_model_state_dict(model, weights)
    else:
        model.load_state_dict(weights, strict=False)


def _trained_weights(
    model: PreTrainedModel | PeftModel, state_dict: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The branches' weights, under the names they have without peft, and those of LoRA, under peft's names."""
    if isinstance(model, PeftModel):
        state_dict = get_peft_model_state_dict(model, state_dict, save_embedding_layers=False)
    branches = {name: weight.contiguous() for name, weight in state_dict.items() if ".pvm_block." in name}
    lora = {}
    if isinstance(model, PeftModel):
        lora = {name: weight.contiguous() for name, weight in state_dict.items() if name not in branches}
    return {name.removeprefix(PEFT_PREFIX): weight for name, weight in branches.items()}, lora


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Not for each file that transformers writes: the bar of the training is on the screen. Also a decorator."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


@contextmanager
def locked_on_main_process(folder: Path, is_main_process: bool) -> Iterator[None]:
    """
    [`locked`] by the main process, which the others follow. Must be called on all ranks.

    Raises:
        UserError: on all ranks.
    """
    with ExitStack() as stack:
        refusal = None
        if is_main_process:
            try:
                stack.enter_context(locked(folder))
            except UserError as error:
                refusal = str(error)
        (refusal,) = broadcast_object_list([refusal])
        if refusal is not None:
            raise UserError(refusal)
        yield


@contextmanager
def staged(folder: Path, accelerator: Accelerator, should_save: bool) -> Iterator[Path]:
    """
    Yield an empty folder whose content is moved into `folder` at the end, complete and flushed to disk. Must be called
    on all ranks; an error inside leaves `folder` as it was.

    Args:
        should_save (`bool`): whether this rank writes.
    """
    staging = folder / STAGING
    if should_save:
        shutil.rmtree(staging, ignore_errors=True)  # leftovers of an interrupted run
        staging.mkdir(parents=True)
    accelerator.wait_for_everyone()
    yield staging
    accelerator.wait_for_everyone()
    if should_save:
        for path in (*staging.rglob("*"), staging):
            _flush(path)  # otherwise a power cut could leave names without contents
        # config.json comes last: without it, nothing loads the folder as a model.
        for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
            target = folder / path.name
            if target.is_dir():
                remove(target)
            os.replace(path, target)
        _flush(folder)
        shutil.rmtree(staging)
    accelerator.wait_for_everyone()


def remove(folder: Path) -> None:
    """Delete a folder so that, if this is interrupted, the rest of it no longer has the folder's name."""
    doomed = folder.parent / STAGING / f"{folder.name}-old"
    doomed.parent.mkdir(exist_ok=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    """Wait until the content of a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
