# Copyright 2026 The Qwen3-VL PVM authors. Licensed under the Apache License, Version 2.0.
"""Saving and loading: whole checkpoints, and adapter checkpoints, which hold branches and name the base."""

import copy
import os
import sys
from collections.abc import Collection

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging
from transformers.utils.hub import cached_file, extract_commit_hash, get_checkpoint_shard_files


try:
    from .configuration_qwen3vl_pvm import Qwen3VLPVMConfig
except ImportError:  # in a checkout, where this file is a top-level module
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
# A gate is the root mean square of what its branch adds: trained ones are below 1.
MAX_GATE = 100.0


class AdapterMixin:
    """`save_pretrained` and `from_pretrained` of all PVM models."""

    def save_pretrained(self, save_directory: str | os.PathLike, adapter_only: bool = False, **kwargs):
        """
        As the stock model, with the code files and a complete `auto_map` for `trust_remote_code`. With `adapter_only`,
        the branches only, to be loaded into the base that the config names.

        Raises:
            ValueError: without a base, or with a folder for what is pushed; with a PEFT adapter in the model.
        """
        if self._hf_peft_config_loaded:
            raise ValueError("The model holds a PEFT adapter, and only that would be saved. Merge it: docs/hub.md.")
        # Shares all weights, and has the config that is to be saved. (FSDP's classes do not take copy.copy.)
        saved = object.__new__(type(self))
        vars(saved).update(vars(self))
        saved.config = config = copy.deepcopy(self.config)
        config.auto_map = dict(AUTO_MAP)
        base = config.base_model_name_or_path
        if not adapter_only:
            config.base_model_name_or_path = config.base_model_revision = config.peft_adapter = None
            return super(AdapterMixin, saved).save_pretrained(save_directory, **kwargs)
        if base is None or (kwargs.get("push_to_hub") and os.path.isdir(base)):
            raise ValueError(
                f"An adapter checkpoint needs the name of its base, if pushed one on the Hub, and has {base}: set "
                "`model.config.base_model_name_or_path`, or save everything, without `adapter_only`."
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
        Load the safetensors of a PVM checkpoint, of a stock one (branches are new, with gates of zero), or of the
        authors' implementation. For other branches pass `config=Qwen3VLPVMConfig.from_stock(...)`, for a base
        somewhere else `base_model_name_or_path=...`.

        Raises:
            OSError: if the checkpoint or its base could not be loaded.
            ValueError: if the base does not fit, or if weights are missing (other than new branches) or corrupted.
        """
        name, config = pretrained_model_name_or_path, kwargs.get("config")
        download = {key: kwargs[key] for key in DOWNLOAD_KWARGS if key in kwargs}
        kwargs |= {"output_loading_info": True, "use_safetensors": True}
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(config or name, **download)
        peft_adapter, base = config.peft_adapter, kwargs.pop("base_model_name_or_path", config.base_model_name_or_path)
        try:
            if is_adapter := None not in (name, base):
                recorded = config.base_model_revision if base == config.base_model_name_or_path else None
                config = copy.deepcopy(config)
                config.base_model_name_or_path = base
                config.base_model_revision = kwargs.pop("base_model_revision", recorded)
                if cls.can_generate():
                    kwargs.setdefault("generation_config", GenerationConfig.from_pretrained(name, **download))
                kwargs = {key: value for key, value in kwargs.items() if key not in DOWNLOAD_KWARGS}
                kwargs |= {"config": config, "state_dict": _load_adapter_weights(name, config, download)}
            model, loading_info = super().from_pretrained(None if is_adapter else name, *args, **kwargs)
            stored = kwargs.get("state_dict")
            if stored is None:
                files = safetensors_files(name, kwargs.get("variant"), **download)
                stored = [key for file in files for key in safe_open(file, "pt").keys()]
        except SafetensorError as error:
            raise OSError(f"A file of weights of {name} or its base is damaged: {error}. Get it again.") from error
        if model._hf_peft_config_loaded:
            raise ValueError(f"{name} has a PEFT adapter beside its config.json, which would change it. Move it away.")
        model.name_or_path = model.config.name_or_path = str(name)
        check_weights(model, name, loading_info["missing_keys"], stored)
        if peft_adapter is not None:
            subfolder = "/".join(filter(None, (download.get("subfolder"), peft_adapter)))
            for file_name in ("adapter_config.json", "adapter_model.safetensors"):
                file = cached_file(name, file_name, **{**download, "subfolder": subfolder})
            _check_missing(f"{name}/{subfolder}", model.load_adapter(os.path.dirname(file)).missing_keys)
        return (model, loading_info) if output_loading_info else model


def safetensors_files(name: str, variant: str | None = None, **download) -> list[str]:
    """Local paths of a whole checkpoint's weights, downloaded if need be. Raises an `OSError` if there are none."""
    weights, index = (
        file if variant is None else f".{variant}.".join(file.rsplit(".", 1))
        for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    try:
        return [cached_file(name, weights, **download)]
    except OSError:
        return get_checkpoint_shard_files(name, cached_file(name, index, **download), **download)[0]


def _load_adapter_weights(name: str, config: Qwen3VLPVMConfig, download: dict) -> dict[str, torch.Tensor]:
    """The weights of the base, mapped from its files, and of the adapter checkpoint's branches."""
    base, training = config.base_model_name_or_path, config.get_text_config().pvm_training or {}
    base_download = {**download, "revision": config.base_model_revision or "main", "subfolder": ""}
    try:
        base_config = type(config).from_pretrained(base, **base_download)
        files = safetensors_files(base, **base_download)
    except OSError as error:
        is_gone = os.path.isabs(base) and not os.path.isdir(base)
        raise OSError(
            f"{name} holds PVM branches only, and their base, {base}, could not be loaded: "
            f"{'there is no such folder.' if is_gone else str(error).partition(chr(10))[0]} If it is somewhere else, "
            "pass `base_model_name_or_path=...`."
        ) from error
    check_base(base_config, config, name)
    trained_on, found = training.get("base_revision"), extract_commit_hash(files[0], None)
    if trained_on not in (None, found):
        logger.warning(
            f"{name} was trained on revision {trained_on} of {training.get('base_model')}, and is loaded into "
            f"revision {found or 'unknown'} of {base}. If the weights differ, so do its answers."
        )
    branches = load_file(cached_file(name, ADAPTER_WEIGHTS_NAME, **download))
    if foreign := [key for key in branches if ".pvm_block." not in key]:
        raise ValueError(
            f"{ADAPTER_WEIGHTS_NAME} of {name} holds weights outside of the branches, e.g. {min(foreign)}, which "
            "would replace the base's. Do not trust this checkpoint."
        )
    return {key: weight for file in files for key, weight in load_file(file).items()} | branches


def check_base(base: Qwen3VLPVMConfig, config: Qwen3VLPVMConfig, name: str) -> None:
    """Refuse a base that computes something else than the one that the adapter checkpoint was made for."""
    # What does not decide what a model computes, or is compared by itself.
    ignored = {*PreTrainedConfig().to_dict(), *config.sub_configs, "auto_map", "quantization_config", "peft_adapter"}
    ignored = ignored - {"tie_word_embeddings"} | {"base_model_name_or_path", "base_model_revision"}
    # Settings of generation, to which Trainer gives the tokenizer's values: Qwen's config.json has no pad token.
    ignored |= {"pad_token_id", "bos_token_id", "eos_token_id"}
    different = []
    for part in ("", *config.sub_configs):
        theirs, ours = ((getattr(model, part) if part else model).to_dict() for model in (base, config))
        for key in sorted(theirs.keys() & ours.keys() - ignored):
            if not key.startswith("pvm_") and theirs[key] != ours[key]:
                different.append(f"{part}.{key} is {theirs[key]} and not {ours[key]}".removeprefix("."))
    if ("quantization_config" in base) != ("quantization_config" in config):
        different.append("only one of the two is stored quantised")
    if different:
        raise ValueError(
            f"{config.base_model_name_or_path} is not the base of {name}, but another model: {'; '.join(different)}. "
            "Pass the right one as `base_model_name_or_path=...`, and `quantization_config=...` to quantise it."
        )


def _check_missing(name: str, missing: Collection[str]) -> None:
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights, e.g. {min(missing)}. Get the complete checkpoint.")


def check_weights(model: torch.nn.Module, name: str, missing: set[str], stored: Collection[str]) -> None:
    """Refuse weights that are in no file, and thus random, but for new branches; and corrupted branches."""
    config, training = model.config, model.config.get_text_config().pvm_training
    # Names from the layers on: those of the backbone alone do not begin with "model.".
    expected, stored = (
        {key[key.find("layers.") :] for key in keys if ".pvm_block." in key} for keys in (model.state_dict(), stored)
    )
    if stored or training or any(made_by.startswith("Qwen3VLPVM") for made_by in config.architectures or ()):
        missing = missing | (expected - stored)
    else:
        logger.warning(
            f"{name} has no PVM branches: new ones, which change nothing, are in layers "
            f"{config.get_text_config().pvm_layers}."
        )
    base = config.base_model_name_or_path
    _check_missing(f"{name} on the base {base}" if base else name, missing)

    # Weights that are offloaded to disk or held by another rank cannot be checked here.
    branches = {key: weight for key, weight in model.named_parameters() if ".pvm_block." in key and weight.numel() > 0}
    largest = {key: weight.abs().max().item() for key, weight in branches.items() if weight.device.type != "meta"}
    for key, value in largest.items():
        if not value <= (MAX_GATE if key.endswith(".gate_alpha") else sys.float_info.max):  # not ">": NaN must fail
            raise ValueError(f"{name}: {key} reaches {value}. The file is damaged, or its training diverged.")
    gates = [value for key, value in largest.items() if key.endswith(".gate_alpha")]
    if training and gates and not any(gates):
        raise ValueError(
            f"{name} says that its branches were trained ({training}), but all gates are exactly 0: these are not the "
            "trained weights."
        )
