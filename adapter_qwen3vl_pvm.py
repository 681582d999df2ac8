# Copyright 2026 The Qwen3-VL PVM authors. Licensed under the Apache License, Version 2.0.
"""
Saving and loading. A whole checkpoint holds all weights. An adapter checkpoint holds the branches only, and its config
names the base that has the others. Both are refused if they are not what they say.
"""

import copy
import os
from collections.abc import Iterable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging
from transformers.utils.hub import cached_file, extract_commit_hash, get_checkpoint_shard_files


try:
    from .block_qwen3vl_pvm import pvm_blocks
    from .configuration_qwen3vl_pvm import Qwen3VLPVMConfig
except ImportError:  # in a checkout, where this file is a top-level module
    from block_qwen3vl_pvm import pvm_blocks
    from configuration_qwen3vl_pvm import Qwen3VLPVMConfig


logger = logging.get_logger(__name__)

ADAPTER_WEIGHTS_NAME = "model.pvm.safetensors"  # which no other class loads
AUTO_MAP = {
    "AutoConfig": "configuration_qwen3vl_pvm.Qwen3VLPVMConfig",
    "AutoModel": "modeling_qwen3vl_pvm.Qwen3VLPVMModel",
    "AutoModelForImageTextToText": "modeling_qwen3vl_pvm.Qwen3VLPVMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_qwen3vl_pvm.Qwen3VLPVMForConditionalGeneration",
}
DOWNLOAD_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# A gate is the root mean square of what its branch adds. Trained ones are below 1; larger values indicate corrupted
# weights.
MAX_GATE = 100.0


class AdapterMixin:
    """`save_pretrained` and `from_pretrained` of all PVM models."""

    def save_pretrained(self, save_directory: str | os.PathLike, adapter_only: bool = False, **kwargs):
        """
        As the stock model, with the code files and a complete `auto_map` for `trust_remote_code`. With `adapter_only`,
        the branches only, to be loaded into the base that the config names.

        Raises:
            ValueError: if an adapter checkpoint has no base, or would be pushed with a base on this machine; if the
                model holds a PEFT adapter, because transformers would save nothing else.
        """
        if self._hf_peft_config_loaded:
            raise ValueError(
                "The model holds a PEFT adapter, and transformers would save nothing else. Merge it first: `python -m "
                "pvm convert CHECKPOINT FOLDER --to whole`."
            )
        # Shares all weights, and has the config that is to be saved. (FSDP's classes do not take copy.copy.)
        saved = object.__new__(type(self))
        vars(saved).update(vars(self))
        saved.config = config = copy.deepcopy(self.config)
        config.auto_map = dict(AUTO_MAP)
        if not adapter_only:
            config.base_model_name_or_path = config.base_model_revision = config.peft_adapter = None
            return super(AdapterMixin, saved).save_pretrained(save_directory, **kwargs)

        base = config.base_model_name_or_path
        if base is None or (kwargs.get("push_to_hub") and os.path.isdir(base)):
            raise ValueError(
                "An adapter checkpoint needs the name of its base"
                f"{'' if base is None else f' on the Hub, and {base} is a folder, which nobody else has'}: set "
                "`model.config.base_model_name_or_path` and `base_model_revision`, or save everything, without "
                "`adapter_only`."
            )
        if "quantization_config" in config:
            if not self.hf_quantizer.pre_quantized:
                del config.quantization_config  # chosen when the base was loaded
            saved.hf_quantizer = None  # branches are never quantised
        state_dict = kwargs.pop("state_dict", None) or self.state_dict()
        branches = {name: weight for name, weight in state_dict.items() if ".pvm_block." in name}
        kwargs |= {"state_dict": branches, "variant": "pvm", "save_original_format": False}
        return super(AdapterMixin, saved).save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """
        Load a PVM checkpoint (whole, or an adapter with its base), a stock Qwen3-VL checkpoint (its branches are new,
        with gates of zero), or one of the authors' implementation. For other branches pass
        `config=Qwen3VLPVMConfig.from_stock(...)`, for a base somewhere else `base_model_name_or_path=...`. Only
        safetensors are read.

        Raises:
            OSError: if the checkpoint or its base could not be loaded.
            ValueError: if the base does not fit, if weights are missing (other than new branches), if a gate is
                corrupted, or if all are zero although the branches were trained.
        """
        name, config = pretrained_model_name_or_path, kwargs.get("config")
        download = {key: kwargs[key] for key in DOWNLOAD_KWARGS if key in kwargs}
        kwargs |= {"output_loading_info": True, "use_safetensors": True}
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(config or name, **download)
        peft_adapter = config.peft_adapter
        is_adapter = name is not None and (config.base_model_name_or_path or "base_model_name_or_path" in kwargs)
        if is_adapter:
            config = copy.deepcopy(config)
            for key in ("base_model_name_or_path", "base_model_revision"):
                setattr(config, key, kwargs.pop(key, getattr(config, key)))
            if cls.can_generate():
                kwargs.setdefault("generation_config", GenerationConfig.from_pretrained(name, **download))
            kwargs = {key: value for key, value in kwargs.items() if key not in DOWNLOAD_KWARGS} | {"config": config}
        try:
            if is_adapter:
                kwargs["state_dict"] = _load_adapter_weights(name, config, download)
            model, loading_info = super().from_pretrained(None if is_adapter else name, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(f"A file of weights of {name} or its base is damaged: {error}. Get it again.") from error
        model.name_or_path = model.config.name_or_path = str(name)
        stored = kwargs.get("state_dict") or _stored_names(name, download, kwargs.get("variant"))
        _check_missing(model, name, loading_info["missing_keys"], stored)
        _check_gates(model, name)
        if peft_adapter is not None:
            _load_peft_adapter(model, name, peft_adapter, download)
        return (model, loading_info) if output_loading_info else model


def safetensors_files(name: str, variant: str | None = None, **download) -> list[str]:
    """Local paths of a whole checkpoint's weights, downloaded if need be. Raises an `OSError` if there are none."""
    weights, index = (
        file if variant is None else f"{file.rpartition('.')[0]}.{variant}.{file.rpartition('.')[2]}"
        for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    try:
        return [cached_file(name, weights, **download)]
    except OSError:
        return get_checkpoint_shard_files(name, cached_file(name, index, **download), **download)[0]


def _stored_names(name: str, download: dict, variant: str | None) -> list[str]:
    names = []
    for file in safetensors_files(name, variant, **download):
        with safe_open(file, "pt") as weights:
            names += weights.keys()
    return names


def _load_adapter_weights(name: str, config: Qwen3VLPVMConfig, download: dict) -> dict[str, torch.Tensor]:
    """The weights of the base, mapped from its files, and of the adapter checkpoint's branches."""
    base, revision = config.base_model_name_or_path, config.base_model_revision
    metadata = config.get_text_config().pvm_training or {}
    trained_on = metadata.get("base_revision")
    if metadata.get("base_model") not in (None, base) and revision == trained_on:
        revision = None  # a commit of the repository that it was trained on, and this is another
    base_download = {**download, "revision": revision or "main", "subfolder": ""}
    try:
        base_config = type(config).from_pretrained(base, **base_download)
        files = safetensors_files(base, **base_download)
    except OSError as error:
        raise OSError(
            f"{name} holds PVM branches only, and their base, {base}, could not be loaded: "
            f"{str(error).partition(chr(10))[0]} If it is somewhere else, pass `base_model_name_or_path=...`."
        ) from error
    _check_base(base_config, config, name)
    found = extract_commit_hash(files[0], None)
    if trained_on not in (None, found):
        logger.warning(
            f"{name} was trained on revision {trained_on} of {metadata.get('base_model')}, and is loaded into "
            f"revision {found or 'unknown'} of {base}. If the weights differ, so do its answers."
        )
    branches = load_file(cached_file(name, ADAPTER_WEIGHTS_NAME, **download))
    if foreign := sorted(key for key in branches if ".pvm_block." not in key):
        raise ValueError(
            f"{ADAPTER_WEIGHTS_NAME} of {name} holds weights outside of the branches, e.g. {foreign[0]}, which would "
            "replace the base's. Do not trust this checkpoint."
        )
    return {key: weight for file in files for key, weight in load_file(file).items()} | branches


def _check_base(base: Qwen3VLPVMConfig, config: Qwen3VLPVMConfig, name: str) -> None:
    """Refuse a base that computes something else than the one that the adapter checkpoint was made for."""
    base_name, different = config.base_model_name_or_path, []
    fields_of_all_models = PreTrainedConfig().to_dict().keys()
    for part in ("text_config", "vision_config"):
        theirs, ours = getattr(base, part).to_dict(), getattr(config, part).to_dict()
        for key in sorted(theirs.keys() & ours.keys() - fields_of_all_models | {"tie_word_embeddings"}):
            if not key.startswith("pvm_") and theirs.get(key) != ours.get(key):
                different.append(f"{part}.{key} is {theirs.get(key)} and not {ours.get(key)}")
    if ("quantization_config" in base) != ("quantization_config" in config):
        different.append(f"its weights are {'not ' if 'quantization_config' in config else ''}stored quantised")
    if different:
        raise ValueError(
            f"{base_name} is not the base of {name}, but another model: {'; '.join(different)}. Pass the right one as "
            "`base_model_name_or_path=...`. (To quantise a plain one while it is loaded, pass "
            "`quantization_config=...`.)"
        )


def _check_missing(model: torch.nn.Module, name: str, missing: set[str], stored: Iterable[str]) -> None:
    """Weights that are in no file are random, which only new branches may be."""
    config, base = model.config, model.config.base_model_name_or_path
    if missing:
        raise ValueError(
            f"{f'The base {base}' if base else name} lacks {len(missing)} weights, e.g. {min(missing)}: they would be "
            "random. Get the complete checkpoint."
        )
    # Names from the layers on: those of the backbone alone do not begin with "model.".
    expected, stored = (
        {key.partition("layers.")[2] for key in keys if ".pvm_block." in key} for keys in (model.state_dict(), stored)
    )
    if expected <= stored:
        return
    lost, metadata = sorted(expected - stored), config.get_text_config().pvm_training
    if metadata or base or stored or any(made_by.startswith("Qwen3VLPVM") for made_by in config.architectures or ()):
        said = f"says that its PVM branches were trained ({metadata})" if metadata else "holds PVM branches"
        raise ValueError(
            f"{name} {said}, but {len(lost)} of their {len(expected)} weights are missing, e.g. layers.{lost[0]}: "
            "they would be random. Get the complete checkpoint, or start new branches from the stock one."
        )
    logger.warning(
        f"{name} has no PVM branches: new ones are in layers {config.get_text_config().pvm_layers}. Until they are "
        "trained, the model computes what the stock model computes."
    )


def _check_gates(model: torch.nn.Module, name: str) -> None:
    gates = {layer_idx: block.gate_alpha for layer_idx, block in pvm_blocks(model).items()}
    # Weights that are offloaded to disk or held by another rank cannot be checked here.
    gates = {layer: gate.item() for layer, gate in gates.items() if gate.device.type != "meta" and gate.numel() > 0}
    for layer, gate in gates.items():
        if not abs(gate) <= MAX_GATE:  # not ">": NaN must fail, too
            raise ValueError(
                f"{name}: the gate of layer {layer} is {gate}, and trained ones are below 1 in magnitude. The file is "
                "damaged, or the training that wrote it diverged."
            )
    metadata = model.config.get_text_config().pvm_training
    if metadata is not None and gates and not any(gates.values()):
        raise ValueError(
            f"{name} says that its PVM branches were trained ({metadata}), but all gates are exactly 0, so it would "
            "answer as the stock model. Its weights are not the trained ones."
        )


def _load_peft_adapter(model, name: str, folder: str, download: dict) -> None:
    subfolder = "/".join(filter(None, (download.get("subfolder"), folder)))
    for file_name in ("adapter_config.json", "adapter_model.safetensors"):
        file = cached_file(name, file_name, **{**download, "subfolder": subfolder})
    if missing := model.load_adapter(os.path.dirname(file)).missing_keys:
        raise ValueError(
            f"The PEFT adapter in {name}/{subfolder} lacks weights, e.g. {min(missing)}: they would be random. Get "
            "the complete checkpoint."
        )
