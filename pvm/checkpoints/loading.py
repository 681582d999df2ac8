"""Loads any checkpoint for evaluation, and refuses one that is not what its config says."""

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_WEIGHTS_NAME
from safetensors import SafetensorError
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import (
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    logging,
)

from adapter_qwen3vl_pvm import ADAPTER_WEIGHTS_NAME
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration, pvm_blocks
from pvm.checkpoints.names import (
    MISSING_IS_NONE,
    base_of,
    branch_block,
    checkpoint_kind,
    commit_of,
    pvm_config,
    weight_pickles,
)
from pvm.errors import UserError, reason


@dataclass
class Description:
    """
    What a checkpoint is.

    path (`str`): folder or Hub name.
    commit (`str` or `None`): the commit that was loaded; `None` for a folder.
    kind (`str`): see [`checkpoint_kind`].
    block (`str` or `None`): the kind of its branches, see [`branch_block`].
    model_class (`str`): the class that is evaluated.
    base (`str` or `None`): of an adapter checkpoint or a PEFT adapter, what it was loaded onto.
    method (`str` or `None`), step (`int` or `None`): training method and step, if the checkpoint records them.
    gates (`dict[str, float]`): the gate of each branch by decoder layer; empty without branches.
    dtype (`str`), parameters (`int`): of the loaded model.
    """

    path: str
    commit: str | None
    kind: str
    block: str | None
    model_class: str
    base: str | None
    method: str | None
    step: int | None
    gates: dict[str, float]
    dtype: str
    parameters: int

    @property
    def gates_on(self) -> bool | None:
        """Whether any gate is not exactly 0; `None` without branches."""
        return any(self.gates.values()) if self.gates else None


@dataclass
class Checkpoint:
    """A model in evaluation mode that generates greedily, with its processor and description."""

    model: PreTrainedModel | PeftModel
    processor: ProcessorMixin
    description: Description

    @property
    def plain_model(self) -> PreTrainedModel:
        """The model without PEFT's wrapper; the adapter's layers stay in it."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model


def load_checkpoint(path: str, dtype: str = "auto", revision: str = "main") -> Checkpoint:
    """
    Load a stock Qwen3-VL, a PVM checkpoint (of this project or the authors') or a PEFT adapter with its base, on the
    GPU if there is one.

    Args:
        path (`str`): folder or Hub name.
        dtype (`str`): "auto" is the checkpoint's own.
        revision (`str`): branch, tag or commit of a Hub name.

    Raises:
        UserError: if there is no such checkpoint, weights are missing, or they do not belong to its config.
    """
    kind = checkpoint_kind(path, revision)
    if kind == "peft":
        return _load_peft_adapter(path, dtype, revision)

    device_map = "auto" if torch.cuda.is_available() else None
    model_class = Qwen3VLPVMForConditionalGeneration if kind == "pvm" else AutoModelForImageTextToText
    config = {"config": pvm_config(path, revision)} if kind == "pvm" else {}
    model = load_weights(model_class, path, revision=revision, dtype=dtype, device_map=device_map, **config)
    processor = load_processor(path, revision)
    _make_greedy(model, processor.tokenizer)
    training, base = {}, None
    if kind == "pvm":
        training, base = model.config.text_config.pvm_training or {}, model.config.base_model_name_or_path
        if model.dtype == torch.float32:
            merge_lora(model)
    step = training.get("step")
    description = Description(
        path=path,
        commit=commit_of(path, revision),
        kind=kind,
        block=branch_block(path, revision),
        model_class=type(model).__name__,
        base=base,
        method=training.get("method"),
        step=trainer_step(path) if step is None else step,
        gates={str(layer_idx): block.gate_alpha.item() for layer_idx, block in pvm_blocks(model).items()},
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=model.num_parameters(),
    )
    return Checkpoint(model.eval(), processor, description)


def load_weights(model_class: type[PreTrainedModel], name: str, **kwargs) -> PreTrainedModel:
    """
    `model_class.from_pretrained`, which leaves no weight random but those of new branches.

    Raises:
        UserError: if weights are missing, damaged or pickles, do not fit the config, or the class refuses them; if a
            folder holds those of two checkpoints.
    """
    adapter, *whole = (Path(name, file) for file in (ADAPTER_WEIGHTS_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if adapter.is_file() and any(file.is_file() for file in whole):
        raise UserError(
            f"{name} holds the weights of two checkpoints, {adapter.name} (branches on a base) and those of a whole "
            "model. Move away what does not belong to its config.json."
        )
    try:
        model, info = model_class.from_pretrained(name, output_loading_info=True, use_safetensors=True, **kwargs)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{name} could not be loaded: {reason(error)}{_about_pickles(name)}") from error
    except (ImportError, ValueError) as error:  # PVM's classes say in a sentence why they refuse a checkpoint
        raise UserError(str(error)) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"The weights in {name} have other shapes than its config.json says; the report above lists them. Get the "
            "complete checkpoint again."
        ) from error
    if info["missing_keys"]:
        raise UserError(
            f"{name} lacks {len(info['missing_keys'])} of its model's weights, e.g. {min(info['missing_keys'])}: they "
            "would be random. Get the complete checkpoint again."
        )
    stray = sorted(key for key in info["unexpected_keys"] if ".pvm_block." in key)
    if stray:
        raise UserError(
            f"{name} holds PVM weights that its config.json does not mention, e.g. {stray[0]}, and the model would "
            "answer without them. Restore the config.json that was saved with them."
        )
    return model


def _load_peft_adapter(path: str, dtype: str, revision: str) -> Checkpoint:
    base_path, base_revision = base_of(path, revision)
    try:
        base = load_checkpoint(base_path, dtype, base_revision)
    except (UserError, OSError) as error:
        raise UserError(f"{path} is a PEFT adapter for {base_path}, which could not be loaded: {error}") from error
    model = add_peft_adapter(base.model, path, revision)
    description = replace(
        base.description,
        path=path,
        commit=commit_of(path, revision),
        kind="peft",
        base=base_path,
        method=model.active_peft_config.peft_type.value.lower(),
        step=trainer_step(path),
        parameters=model.num_parameters(),
    )
    if base.model.dtype == torch.float32:
        # A merged adapter costs nothing at run time. In a smaller dtype merging would round its effect away.
        model = model.merge_and_unload()
    return Checkpoint(model.eval(), processor_of(path, revision), description)


def add_peft_adapter(model: PreTrainedModel, name: str, revision: str, subfolder: str | None = None) -> PeftModel:
    """
    A model with a PEFT adapter from a folder or Hub name.

    Raises:
        UserError: if the adapter's weights are missing, damaged or pickles.
    """
    try:
        cached_file(name, PEFT_WEIGHTS_NAME, revision=revision, subfolder=subfolder or "")  # peft would read pickles
        with warnings.catch_warnings():
            # peft only warns, and the model would answer like its base.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft's use
            return PeftModel.from_pretrained(model, name, revision=revision, subfolder=subfolder)
    except UserWarning as error:
        raise UserError(f"{name} lacks weights. Get the complete PEFT adapter again.") from error
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The PEFT adapter {name} could not be loaded: {reason(error)}{_about_pickles(name)}"
        ) from error


def _about_pickles(name: str) -> str:
    pickles = weight_pickles(file.name for file in Path(name).iterdir()) if Path(name).is_dir() else []
    return f" {pickles[0]} is a pickle, which is never read: save it as safetensors." if pickles else ""


def merge_lora(model: torch.nn.Module) -> None:
    """Add LoRA to the weights that it adapts, so that it costs nothing at run time. Rounds in a small dtype."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()


def _make_greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Replace the checkpoint's generation config, sampling and penalties included; keep its end-of-sequence tokens."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=ends if isinstance(ends, list) else [ends],
        pad_token_id=tokenizer.pad_token_id,
    )


def load_processor(path: str, revision: str = "main") -> ProcessorMixin:
    """The processor saved with a checkpoint."""
    # The processor needs none of a PVM checkpoint's code; without this transformers would warn that it was not run.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise UserError(
            f"{path} has no processor, or a damaged one: copy its base's files. ({reason(error)})"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def processor_of(path: str, revision: str = "main") -> ProcessorMixin:
    """The processor of a checkpoint of any kind: a PEFT adapter saved without one uses its base's."""
    if checkpoint_kind(path, revision) == "peft":
        names = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)
        if not any(cached_file(path, name, revision=revision, **MISSING_IS_NONE) for name in names):
            return processor_of(*base_of(path, revision))
    return load_processor(path, revision)


def trainer_step(path: str) -> int | None:
    """The step in the Trainer's own record, which stays on this machine; `None` without one."""
    file = Path(path, "trainer_state.json")
    return json.loads(file.read_text())["global_step"] if file.is_file() else None
