"""Loads any checkpoint for evaluation, and makes sure that what is evaluated is what the checkpoint says it is."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, cached_file, logging
from transformers.utils.hub import extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file

from configuration_qwen3vl_pvm import REFERENCE_ARCHITECTURE, Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration, pvm_blocks
from pvm.checkpoints.names import stored_config
from pvm.errors import UserError
from pvm.variants import VARIANTS


MODEL_CLASS = {
    "stock": AutoModelForImageTextToText,
    "pvm": Qwen3VLPVMForConditionalGeneration,
    **VARIANTS,
}


@dataclass
class Description:
    """
    What a checkpoint is.

    path (`str`): folder or Hub name.
    commit (`str` or `None`): of a Hub name, the one that was loaded.
    kind (`str`): "stock", "pvm", a variant of it ("mlp", "token_gate") or "adapter".
    model_class (`str`): the class that is evaluated.
    base (`str` or `None`): what an adapter was loaded onto.
    method, step: what trained it and for how long, where the checkpoint says so.
    gates (`dict[str, float]`): the gate of each branch by decoder layer; empty without branches.
    dtype (`str`), parameters (`int`): of the loaded model.
    """

    path: str
    commit: str | None
    kind: str
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
    """A model in evaluation mode that generates greedily, its processor, and what the two are."""

    model: PreTrainedModel | PeftModel
    processor: ProcessorMixin
    description: Description

    @property
    def plain_model(self) -> PreTrainedModel:
        """The model without PEFT's wrapper; an adapter's layers are inside it."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model


def checkpoint_kind(path: str, revision: str = "main") -> str:
    """
    What kind of checkpoint a folder or Hub name is, from its config files alone: see [`Description`].

    Raises:
        UserError: if it is none of these, or not to be found.
    """
    try:
        if find_adapter_config_file(path, revision=revision) is not None:
            return "adapter"
    except OSError:
        pass  # what is no folder and not to be had is said next
    stored = stored_config(path, revision)
    model_type, architectures = stored.get("model_type"), stored.get("architectures")
    if model_type == Qwen3VLPVMConfig.model_type or architectures == [REFERENCE_ARCHITECTURE]:
        return "pvm"
    for kind, model_class in VARIANTS.items():
        if model_type == model_class.config_class.model_type:
            return kind
    if model_type != "qwen3_vl":
        raise UserError(
            f"{path} has the model type {model_type!r}. Supported are dense Qwen3-VL (`qwen3_vl`), PVM "
            f"(`{Qwen3VLPVMConfig.model_type}`), its variants in pvm/variants.py, and PEFT adapters."
        )
    return "stock"


def branch_layers(path: str) -> list[int]:
    """The decoder layers that have a branch, as the config of a PVM checkpoint or a variant says; else empty."""
    if checkpoint_kind(path) not in ("pvm", *VARIANTS):
        return []
    return stored_config(path)["text_config"]["pvm_layers"]


def base_of(path: str, revision: str = "main") -> tuple[str, str] | None:
    """Name and revision of the checkpoint that one goes into, if it holds only what was trained."""
    if checkpoint_kind(path, revision) == "adapter":
        config = PeftConfig.from_pretrained(path, revision=revision)
        return config.base_model_name_or_path, config.revision or "main"
    stored = stored_config(path, revision)
    base = stored.get("base_model_name_or_path")
    return base and (base, stored.get("base_model_revision") or "main")


def checkpoint_state(path: str) -> list[Any]:
    """
    What tells states of a checkpoint, and of the base that it goes into, apart: of a folder the names, sizes and times
    of its files, those of LoRA beside branches among them; of a Hub name the commit.
    """
    base = base_of(path)
    return [_commit(path) or _files(path), base and (_commit(*base) or _files(base[0]))]


def _commit(path: str, revision: str = "main") -> str | None:
    if Path(path).is_dir():
        return None
    config = ADAPTER_CONFIG_NAME if checkpoint_kind(path, revision) == "adapter" else CONFIG_NAME
    return extract_commit_hash(cached_file(path, config, revision=revision), None)


def _files(path: str) -> list[list[Any]]:
    folder = Path(path)
    files = sorted(file for file in [*folder.iterdir(), *folder.glob("lora/*")] if file.is_file())
    return [[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def load_checkpoint(path: str, dtype: str = "auto", revision: str = "main") -> Checkpoint:
    """
    Load a stock Qwen3-VL, a PVM checkpoint (this project's or the authors') or a PEFT adapter, on the GPU if there is
    one.

    Args:
        path (`str`): folder or Hub name.
        dtype (`str`): "auto" is the checkpoint's.
        revision (`str`): branch, tag or commit of a Hub name.

    Raises:
        UserError: if there is no such checkpoint, or it lacks weights, or would be evaluated as another model than it
            says.
        TypeError: if the class of the loaded model is not that of its kind.
    """
    kind = checkpoint_kind(path, revision)
    if kind == "adapter":
        return _load_adapter(path, dtype, revision)

    device_map = "auto" if torch.cuda.is_available() else None
    model, info = load_weights(MODEL_CLASS[kind], path, revision=revision, dtype=dtype, device_map=device_map)
    if info["missing_keys"]:
        raise UserError(
            f"{path} lacks {len(info['missing_keys'])} of its model's weights, e.g. {min(info['missing_keys'])}: they "
            "would be random. Get the complete checkpoint."
        )
    stray = sorted(key for key in info["unexpected_keys"] if ".pvm_block." in key)
    if stray:
        raise UserError(
            f"{path} holds PVM weights, e.g. {stray[0]}, but its config.json does not say so, and the model would "
            "answer without them. Restore the config.json that was saved with it."
        )
    if kind != "stock" and type(model) is not MODEL_CLASS[kind]:
        raise TypeError(f"{path} is a checkpoint of kind {kind}, but was loaded as {type(model).__name__}.")
    if kind == "stock" and pvm_blocks(model):
        raise TypeError(f"{path} is a stock checkpoint, but was loaded with PVM branches.")

    processor = load_processor(path, revision)
    _make_greedy(model, processor.tokenizer)
    if kind == "stock":
        return Checkpoint(model.eval(), processor, _describe(model, path, revision, kind))
    mark = model.config.text_config.pvm_training or {}
    description = _describe(model, path, revision, kind, mark.get("method"), mark.get("step"))
    description.base = model.config.base_model_name_or_path
    if model.dtype == torch.float32:
        merge_lora(model)
    return Checkpoint(model.eval(), processor, description)


def load_weights(
    model_class: type[PreTrainedModel], name: str, **kwargs
) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """
    `model_class.from_pretrained`, with what it misses or did not expect.

    Raises:
        UserError: if the weights do not fit the config, or the class refuses them.
    """
    try:
        return model_class.from_pretrained(name, output_loading_info=True, **kwargs)
    except (ImportError, ValueError) as error:  # how our model refuses a checkpoint, in a sentence
        raise UserError(str(error)) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"The weights in {name} are of other shapes than its config.json says; the report above names them. They "
            "do not belong together: get the complete checkpoint again."
        ) from error


def _load_adapter(path: str, dtype: str, revision: str) -> Checkpoint:
    config = PeftConfig.from_pretrained(path, revision=revision)
    base_path, base_revision = base_of(path, revision)
    try:
        base = load_checkpoint(base_path, dtype, base_revision)  # the one that it was trained on
    except (UserError, OSError) as error:
        raise UserError(f"{path} is an adapter for {base_path}, which cannot be loaded: {error}") from error
    try:
        with warnings.catch_warnings():
            # peft only warns, and the model would answer as its base.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base.model, path, revision=revision)
    except UserWarning as error:
        raise UserError(f"{path} lacks weights of its adapter. Get the complete checkpoint.") from error
    description = _describe(model.base_model.model, path, revision, "adapter", config.peft_type.value.lower())
    description.base, description.parameters = base_path, model.num_parameters()
    if base.model.dtype == torch.float32:
        # Merged, it costs nothing at run time. In a smaller dtype merging would round the adapter's effect away.
        model = model.merge_and_unload()
    return Checkpoint(model.eval(), processor_of(path, revision), description)


def merge_lora(model: torch.nn.Module) -> None:
    """Add LoRA to the weights that it adapts, so that it costs nothing at run time. Rounds in a small dtype."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()


def _make_greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Replace the checkpoint's way to sample, penalties and all; only what ends its answers is kept."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=ends if isinstance(ends, list) else [ends],
        pad_token_id=tokenizer.pad_token_id,
    )


def load_processor(path: str, revision: str = "main") -> ProcessorMixin:
    """The processor that lies beside a checkpoint."""
    # A processor needs none of a PVM checkpoint's code, which transformers would otherwise offer to run, and warns
    # about when it is told not to.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=False)
    finally:
        logging.set_verbosity(verbosity)


def processor_of(path: str, revision: str = "main") -> ProcessorMixin:
    """The processor of a checkpoint of any kind; an adapter's is its base's, unless it has one beside it."""
    # train.py saves the processor beside the adapter, peft alone does not.
    if checkpoint_kind(path, revision) == "adapter":
        missing_is_none = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        if not any(cached_file(path, name, **missing_is_none) for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)):
            return processor_of(*base_of(path, revision))
    return load_processor(path, revision)


def _describe(
    model: PreTrainedModel, path: str, revision: str, kind: str, method: str | None = None, step: int | None = None
) -> Description:
    trainer_state = Path(path, "trainer_state.json")
    if step is None and trainer_state.is_file():
        step = json.loads(trainer_state.read_text())["global_step"]
    return Description(
        path=path,
        commit=_commit(path, revision),
        kind=kind,
        model_class=type(model).__name__,
        base=None,
        method=method,
        step=step,
        gates={str(layer_idx): block.gate_alpha.item() for layer_idx, block in pvm_blocks(model).items()},
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=model.num_parameters(),
    )
