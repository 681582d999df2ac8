# Copyright 2026 The Qwen3-VL PVM authors. Licensed under the Apache License, Version 2.0.
"""Configuration of Qwen3-VL with Persistent Visual Memory (PVM, arXiv 2605.00814)."""

from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import Qwen3VLConfig, Qwen3VLTextConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

TRANSFORMERS = ((5, 16), (5, 24))  # the first version that this was run with, and the first after the last

# The name of the authors' implementation in `config.json`; its parameter names are ours.
REFERENCE_ARCHITECTURE = "PVMQwen3VLForConditionalGeneration"


def default_pvm_layers(hidden_size: int, num_hidden_layers: int) -> list[int]:
    """The decoder layers that carry a branch by default: at 2/9, 4/9 and 6/9 of the decoder, as published for 8B."""
    if (hidden_size, num_hidden_layers) == (2560, 36):
        return [5, 11, 17]  # published for Qwen3-VL-4B
    return sorted({min(round(num_hidden_layers * share / 9), num_hidden_layers - 1) for share in (2, 4, 6)})


@strict
class Qwen3VLPVMTextConfig(Qwen3VLTextConfig):
    r"""
    The stock text config with five more fields.

    Args:
        pvm_layers (`list[int]`, *optional*):
            Indices of the decoder layers that carry a branch; [`default_pvm_layers`] if left out.
        pvm_hidden_size (`int`, defaults to 512):
            Width of the branch (d' in the paper); a multiple of `head_dim`.
        pvm_causal (`bool`, defaults to `True`):
            Whether a text token attends only to the visual tokens before it; else to all of its row, as in the
            authors' implementation.
        pvm_block (`str`, defaults to `"pvm"`):
            The kind of branch: a key of `BLOCKS` in variants_qwen3vl_pvm.py.
        pvm_training (`dict`, *optional*):
            Training metadata: `method`, `step`, `base_model`, `base_revision`. A checkpoint that has it but lacks
            branch weights, or has all gates at zero, is refused.

    Raises:
        ValueError: for the text config of a mixture-of-experts model.
        StrictDataclassClassValidationError: for layers or a width that do not fit the decoder.
    """

    model_type = "qwen3_vl_pvm_text"

    pvm_layers: list[int] | tuple[int, ...] | None = None
    pvm_hidden_size: int = 512
    pvm_causal: bool = True
    pvm_block: str = "pvm"
    pvm_training: dict | None = None

    def __post_init__(self, **kwargs):
        if experts := sorted(name for name in kwargs if "experts" in name):
            raise ValueError(
                f"PVM supports dense Qwen3-VL models only, and `{experts[0]}` belongs to a mixture-of-experts model. "
                "Start from a dense checkpoint, e.g. Qwen/Qwen3-VL-8B-Instruct."
            )
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)
        if self.pvm_layers is None:
            self.pvm_layers = default_pvm_layers(self.hidden_size, self.num_hidden_layers)

    @property
    def pvm_num_attention_heads(self) -> int:
        """Query heads of the branch, each of the backbone's `head_dim`."""
        return self.pvm_hidden_size // self.head_dim

    @property
    def pvm_num_key_value_heads(self) -> int:
        """Key/value heads of the branch: the backbone's grouped-query ratio, at least one head."""
        return max(1, self.pvm_num_attention_heads * self.num_key_value_heads // self.num_attention_heads)

    @property
    def pvm_intermediate_size(self) -> int:
        """Width of the branch's SwiGLU: the backbone's ratio of intermediate to hidden size."""
        return int(self.pvm_hidden_size * self.intermediate_size / self.hidden_size)

    # `strict` runs the `validate_*` methods after construction.
    def validate_pvm_layers(self):
        layers, number = list(self.pvm_layers), self.num_hidden_layers
        if not layers or len(set(layers)) < len(layers) or not all(0 <= layer < number for layer in layers):
            raise ValueError(
                f"`pvm_layers={layers}` must name at least one of the decoder layers 0 to {number - 1}, each once. "
                f"Write e.g. `pvm_layers={default_pvm_layers(self.hidden_size, number)}`, or leave it out."
            )

    def validate_pvm_hidden_size(self):
        heads, rest = divmod(self.pvm_hidden_size, self.head_dim)
        if heads < 1 or rest or heads % self.pvm_num_key_value_heads:
            unit = self.head_dim * (self.num_attention_heads // self.num_key_value_heads)
            raise ValueError(
                f"`pvm_hidden_size={self.pvm_hidden_size}` does not split into heads of `head_dim={self.head_dim}` in "
                f"the backbone's grouped-query ratio. Write a multiple of {unit}, e.g. "
                f"`pvm_hidden_size={max(self.pvm_hidden_size // unit, 1) * unit}`."
            )


@strict
class Qwen3VLPVMConfig(Qwen3VLConfig):
    r"""
    The stock [`Qwen3VLConfig`] with a [`Qwen3VLPVMTextConfig`] as its `text_config`. Loading the config of a stock
    Qwen3-VL checkpoint, or of the authors' implementation (`pvm_causal` is then off), converts it.

    Args:
        base_model_name_or_path (`str`, *optional*):
            Of an adapter checkpoint, which holds branches only: Hub name or folder of the model with all else.
        base_model_revision (`str`, *optional*):
            Branch, tag or commit of the base on the Hub.
        peft_adapter (`str`, *optional*):
            Subfolder of an adapter checkpoint with a PEFT adapter (LoRA) that was trained with the branches.
    """

    model_type = "qwen3_vl_pvm"
    sub_configs = {"vision_config": Qwen3VLConfig.sub_configs["vision_config"], "text_config": Qwen3VLPVMTextConfig}
    _auto_class = "AutoConfig"  # every save writes the code file beside the config

    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    peft_adapter: str | None = None

    def __post_init__(self, **kwargs):
        first, next_untested = TRANSFORMERS
        if not first <= tuple(map(int, transformers.__version__.split(".")[:2])) < next_untested:
            # By the logger of transformers: once, however many checkpoints bring this file along.
            logging.get_logger("transformers").warning_once(
                "The PVM code was run with transformers >= {}.{}, < {}.{}, and this is {}. If something fails, "
                "install one of those.".format(*first, *next_untested, transformers.__version__)
            )
        if self.text_config is None or isinstance(self.text_config, dict):
            self.text_config = Qwen3VLPVMTextConfig(**(self.text_config or {}))
        elif not isinstance(self.text_config, Qwen3VLPVMTextConfig):
            raise ValueError(
                f"`text_config` is a {type(self.text_config).__name__}, which has no PVM fields. Convert a stock "
                "config with `Qwen3VLPVMConfig.from_stock(config, pvm_layers=...)`."
            )
        super().__post_init__(**kwargs)

    def validate_peft_adapter(self):
        if self.peft_adapter is not None and not self.peft_adapter.isidentifier():  # a path may lead outside
            raise ValueError(f"`peft_adapter={self.peft_adapter}` must be the name of a subfolder, e.g. `lora`.")

    @classmethod
    def from_stock(cls, config: Qwen3VLConfig, **pvm_fields: Any) -> "Qwen3VLPVMConfig":
        """The config of a dense Qwen3-VL model with fields of [`Qwen3VLPVMTextConfig`]; `ValueError` for others."""
        fields = cls._from_stock_dict(config.to_dict())
        return cls.from_dict({**fields, "text_config": {**fields["text_config"], **pvm_fields}})

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict and config_dict.get("model_type") != cls.model_type:
            config_dict = cls._from_stock_dict(config_dict)
        return config_dict, kwargs

    @classmethod
    def _from_stock_dict(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        if config_dict.get("model_type") != Qwen3VLConfig.model_type:
            raise ValueError(
                f"PVM branches fit the dense Qwen3-VL models (`model_type: {Qwen3VLConfig.model_type}`), not "
                f"`model_type: {config_dict.get('model_type')}`. Start from e.g. Qwen/Qwen3-VL-8B-Instruct."
            )
        fields = {**config_dict, "model_type": cls.model_type}
        if fields.pop("architectures", None) == [REFERENCE_ARCHITECTURE]:
            logger.warning(
                f"This checkpoint was written by the authors' implementation ({REFERENCE_ARCHITECTURE}), in which "
                "text also attends to images that come after it: loading it with `pvm_causal=False`."
            )
            metadata = {"method": "pvm", "step": None, "implementation": REFERENCE_ARCHITECTURE}
            fields["text_config"] = {**fields["text_config"], "pvm_causal": False, "pvm_training": metadata}
        return fields


__all__ = ["Qwen3VLPVMConfig", "Qwen3VLPVMTextConfig"]
