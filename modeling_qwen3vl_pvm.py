# Copyright 2026 The Qwen3-VL PVM authors. Licensed under the Apache License, Version 2.0.
"""
Qwen3-VL with Persistent Visual Memory (PVM, arXiv 2605.00814): what differs from the stock model, and nothing else.

A few decoder layers carry a gated branch beside their FFN. It is a cross-attention from text tokens to the visual
embeddings as they entered the decoder, so its softmax runs over the image only and text cannot dilute it:

    y = x + FFN(RMSNorm(x)) + gate * RMSNorm(W_out h) * is_text
    h = a + SwiGLU(RMSNorm(a)),   a = CrossAttention(RMSNorm(W_text x); W_vision V)

During generation the branch's keys and values are computed once, when the visual tokens arrive, and ride with the KV
cache: each branch keeps them in the cache layer of its own decoder layer. So do the offsets that images cause in the
rotary positions (M-RoPE) of the text after them, which the stock model keeps on a module. No module holds any state.
"""

import copy
import functools
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from huggingface_hub import parse_local_safetensors_file_metadata
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLPreTrainedModel,
    Qwen3VLTextAttention,
    Qwen3VLTextDecoderLayer,
    Qwen3VLTextMLP,
    Qwen3VLTextModel,
    Qwen3VLTextRMSNorm,
    Qwen3VLVisionModel,
    eager_attention_forward,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging
from transformers.utils.hub import cached_file, extract_commit_hash, get_checkpoint_shard_files


try:
    from .configuration_qwen3vl_pvm import (
        ADAPTER_VARIANT,
        ADAPTER_WEIGHTS_NAME,
        Qwen3VLPVMConfig,
        Qwen3VLPVMTextConfig,
    )
except ImportError:  # imported from a checkout, where this file is a top-level module
    from configuration_qwen3vl_pvm import (
        ADAPTER_VARIANT,
        ADAPTER_WEIGHTS_NAME,
        Qwen3VLPVMConfig,
        Qwen3VLPVMTextConfig,
    )


logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoConfig": "configuration_qwen3vl_pvm.Qwen3VLPVMConfig",
    "AutoModel": "modeling_qwen3vl_pvm.Qwen3VLPVMModel",
    "AutoModelForImageTextToText": "modeling_qwen3vl_pvm.Qwen3VLPVMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_qwen3vl_pvm.Qwen3VLPVMForConditionalGeneration",
}

# Position of a slot that holds no visual token, in rows that have fewer than their neighbours: after every query.
NO_POSITION = torch.iinfo(torch.int32).max

# What is injected has the gate as its root mean square; trained gates are below 1, uninitialised memory is anything.
MAX_GATE = 100.0

# What an adapter's base must have in common with it, by part of the config.
SHAPE = {
    "config": ("tie_word_embeddings",),
    "text_config": (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "attention_bias"),
    ),
    "vision_config": (
        *(
            "depth",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "in_channels",
            "patch_size",
            "temporal_patch_size",
        ),
        *("spatial_merge_size", "out_hidden_size", "num_position_embeddings", "deepstack_visual_indexes"),
    ),
}


class VisualRouting(NamedTuple):
    """
    Who reads what in one forward pass; made once by the text model and shared by all its branches. `visual` counts the
    tokens in memory, those of earlier passes included; indices count within this pass, positions within the sequence.

    visual_positions (`torch.IntTensor` `[batch, visual]`): `NO_POSITION` where a row has no such token.
    rope_deltas (`torch.IntTensor` `[batch, visual]`): how far the rotary position after the visual token is from the
        number of tokens (padding not counted) up to it; at the last token of an image, that of the text after it.
    complete (`bool`): no slot of `visual_positions` is `NO_POSITION`.
    query_index (`torch.LongTensor` `[batch, query]` or `None`): the tokens that go through the branch; `None`: all.
    reads (`torch.BoolTensor` `[batch, query, 1]` or `None`): queries that see any visual token; `None`: all.
    mask (`torch.BoolTensor` `[batch, 1, query, visual]` or `None`): who sees whom; `None`: everything is visible.
    """

    visual_positions: torch.IntTensor
    rope_deltas: torch.IntTensor
    complete: bool
    query_index: torch.LongTensor | None = None
    reads: torch.BoolTensor | None = None
    mask: torch.BoolTensor | None = None


@dataclass
class VisualMemory:
    """
    What one branch remembers of the images and videos of a conversation.

    keys, values (`torch.Tensor` `[batch, key_value_heads, visual, head_dim]`): in the branch's dtype.
    positions, rope_deltas (`torch.IntTensor` `[batch, visual]`), complete (`bool`): as in [`VisualRouting`]; the same
        tensors in all branches.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.IntTensor
    rope_deltas: torch.IntTensor
    complete: bool

    @property
    def last_rope_delta(self) -> torch.LongTensor:
        """`[batch, 1]`: rotary position minus number of tokens for the text that follows; 0 in rows without images."""
        present = self.positions != NO_POSITION
        last = self.positions.masked_fill(~present, -1).argmax(dim=1, keepdim=True)
        return self.rope_deltas.gather(1, last).masked_fill(~present.any(dim=1, keepdim=True), 0).long()

    def select(self, rows: torch.LongTensor) -> "VisualMemory":
        """The memory of the given batch rows, in that order."""
        rows = rows.to(self.keys.device)
        return VisualMemory(
            self.keys[rows], self.values[rows], self.positions[rows], self.rope_deltas[rows], self.complete
        )

    def crop(self, length: int) -> "VisualMemory | None":
        """The memory of the first `length` positions of the sequence, `None` if no row has any there."""
        positions = self.positions.masked_fill(self.positions >= length, NO_POSITION)
        kept = (positions != NO_POSITION).any(dim=0)
        if not kept.any():
            return None
        positions = positions[:, kept]
        complete = bool((positions != NO_POSITION).all())
        return VisualMemory(
            self.keys[:, :, kept], self.values[:, :, kept], positions, self.rope_deltas[:, kept], complete
        )

    def to(self, device: torch.device | str) -> "VisualMemory":
        keys, values = (states.to(device, non_blocking=True) for states in (self.keys, self.values))
        return VisualMemory(keys, values, self.positions.to(device), self.rope_deltas.to(device), self.complete)


class VisualMemoryLayerMixin:
    """Lets a [`VisualMemory`] follow whatever is done to the cache layer that it rides with."""

    layer_class: type[CacheLayerMixin]
    visual_memory: VisualMemory | None = None

    def reset(self):
        super().reset()
        self.visual_memory = None

    def crop(self, *args, **kwargs):
        super().crop(*args, **kwargs)
        if self.visual_memory is not None:
            self.visual_memory = self.visual_memory.crop(self.get_seq_length())

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        if self.visual_memory is not None:
            self._select_rows(torch.arange(self.visual_memory.keys.shape[0]).repeat_interleave(repeats))

    def offload(self):
        super().offload()
        if self.visual_memory is not None:
            self.visual_memory = self.visual_memory.to("cpu")

    def prefetch(self):
        super().prefetch()
        if self.visual_memory is not None:
            self.visual_memory = self.visual_memory.to(self.device)

    def _select_rows(self, rows):
        if self.visual_memory is not None:
            self.visual_memory = self.visual_memory.select(rows)

    def __reduce__(self):
        # The class is made at run time, so pickle (a prompt cache on disk) finds it by the layer class it extends.
        return _new_layer, (self.layer_class,), self.__dict__


@functools.cache
def _with_visual_memory(layer_class: type[CacheLayerMixin]) -> type[CacheLayerMixin]:
    # `_layer_type` must not be inherited: transformers would register the subclass for every cache made later.
    attributes = {"layer_class": layer_class, "_layer_type": None, "__module__": __name__}
    return type(f"VisualMemory{layer_class.__name__}", (VisualMemoryLayerMixin, layer_class), attributes)


def _new_layer(layer_class: type[CacheLayerMixin]) -> VisualMemoryLayerMixin:
    layer_class = _with_visual_memory(layer_class)
    return layer_class.__new__(layer_class)


def read_visual_memory(past_key_values: Cache | None, layer_idx: int) -> VisualMemory | None:
    """The memory that rides with decoder layer `layer_idx` in the cache, `None` if nothing has been seen yet."""
    if past_key_values is None or layer_idx >= len(past_key_values.layers):
        return None
    layer = past_key_values.layers[layer_idx]
    return layer.visual_memory if isinstance(layer, VisualMemoryLayerMixin) else None


def write_visual_memory(past_key_values: Cache, layer_idx: int, memory: VisualMemory) -> None:
    """
    Let `memory` ride with decoder layer `layer_idx`. The layer object that the cache was made with, of whatever class,
    is replaced once by one of the same class that carries a memory and shares all its attributes.
    """
    layer = past_key_values.layers[layer_idx]
    if not isinstance(layer, VisualMemoryLayerMixin):
        carrier = _new_layer(type(layer))
        carrier.__dict__ = layer.__dict__
        past_key_values.layers[layer_idx] = layer = carrier
    layer.visual_memory = memory


class Qwen3VLPVMCrossAttention(nn.Module):
    """Attention from text to visual tokens with the backbone's head size, GQA ratio and head norms, without rotary."""

    def __init__(self, config: Qwen3VLPVMTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        heads, key_value_heads = config.pvm_num_attention_heads, config.pvm_num_key_value_heads
        self.num_key_value_groups = heads // key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False

        hidden_size, bias = config.pvm_hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden_size, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden_size, bias=bias)
        self.q_norm = Qwen3VLTextRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3VLTextRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor | None,
        visual_states: torch.Tensor | None,
        routing: VisualRouting,
        past_key_values: Cache | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` `[batch, query, pvm_hidden_size]`, *optional*): the text tokens; `None` only
                to remember what is to be seen.
            visual_states (`torch.Tensor` `[batch, new visual, pvm_hidden_size]`, *optional*): visual tokens of this
                pass; `None` if it brings none and memory alone is read.
            routing (`VisualRouting`): who reads what.
            past_key_values (`Cache`, *optional*): where the memory of earlier passes is, and this one's goes.

        Returns:
            `[batch, query, pvm_hidden_size]`, exactly zero for a query that sees nothing, and, with eager attention,
            the weights `[batch, heads, query, visual]`.
        """
        memory = read_visual_memory(past_key_values, self.layer_idx)
        if visual_states is not None:
            visual_shape = (*visual_states.shape[:-1], -1, self.head_dim)
            key = self.k_norm(self.k_proj(visual_states).view(visual_shape)).transpose(1, 2)
            value = self.v_proj(visual_states).view(visual_shape).transpose(1, 2)
            if memory is not None:
                key = torch.cat([memory.keys.to(key.device), key], dim=2)
                value = torch.cat([memory.values.to(value.device), value], dim=2)
            if past_key_values is not None:
                memory = VisualMemory(key, value, routing.visual_positions, routing.rope_deltas, routing.complete)
                write_visual_memory(past_key_values, self.layer_idx, memory)
        if hidden_states is None:
            return None, None

        input_shape = hidden_states.shape[:-1]
        query = self.q_norm(self.q_proj(hidden_states).view(*input_shape, -1, self.head_dim)).transpose(1, 2)
        if visual_states is None:
            key, value = memory.keys.to(query.device), memory.values.to(query.device)

        implementation, mask = self.config._attn_implementation, routing.mask
        if implementation == "eager":
            if mask is not None:
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        elif mask is not None or query.dtype == torch.float32:
            # Only sdpa takes a mask of this form, and flash attention neither that nor float32.
            implementation = "sdpa"
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=False,
        )
        attn_output = self.o_proj(attn_output.reshape(*input_shape, -1))
        if routing.reads is not None:
            attn_output = attn_output.masked_fill(~routing.reads, 0.0)
            if attn_weights is not None:
                attn_weights = attn_weights.masked_fill(~routing.reads[:, None], 0.0)
        return attn_output, attn_weights


class Qwen3VLPVMBlock(nn.Module):
    """The branch of one decoder layer; its parameter names are those of the authors' implementation."""

    def __init__(self, config: Qwen3VLPVMTextConfig, layer_idx: int):
        super().__init__()
        latent_config = copy.deepcopy(config)
        latent_config.hidden_size = config.pvm_hidden_size
        latent_config.intermediate_size = config.pvm_intermediate_size

        self.text_reducer = nn.Linear(config.hidden_size, config.pvm_hidden_size, bias=False)
        self.vision_reducer = nn.Linear(config.hidden_size, config.pvm_hidden_size, bias=False)
        self.input_norm = Qwen3VLTextRMSNorm(config.pvm_hidden_size, eps=config.rms_norm_eps)
        self.cross_attn = Qwen3VLPVMCrossAttention(config, layer_idx)
        self.post_attn_norm = Qwen3VLTextRMSNorm(config.pvm_hidden_size, eps=config.rms_norm_eps)
        self.mlp = Qwen3VLTextMLP(latent_config)
        self.output_expander = nn.Linear(config.pvm_hidden_size, config.hidden_size, bias=False)
        self.gate_alpha = nn.Parameter(torch.zeros(1))
        self.eps = config.rms_norm_eps

    def forward(
        self,
        hidden_states: torch.Tensor | None,
        visual_embeds: torch.Tensor | None,
        routing: VisualRouting,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor | None:
        """
        Args:
            hidden_states (`torch.Tensor` `[batch, query, hidden_size]`, *optional*): the residual stream x at the text
                tokens; `None` only to remember what is to be seen, while the branch is off.
            visual_embeds (`torch.Tensor` `[batch, new visual, hidden_size]`, *optional*): V of this pass.
            routing, past_key_values: as in [`Qwen3VLPVMCrossAttention`].

        Returns:
            `torch.Tensor` `[batch, query, hidden_size]` in the dtype of `hidden_states`: what is added to the stream.
        """
        # The branch may be kept in another dtype than the backbone: float32 in training, where AdamW needs it.
        dtype = self.gate_alpha.dtype
        visual_states = None if visual_embeds is None else self.vision_reducer(visual_embeds.to(dtype))
        if hidden_states is None:
            self.cross_attn(None, visual_states, routing, past_key_values)
            return None
        query_states = self.input_norm(self.text_reducer(hidden_states.to(dtype)))
        attended, _ = self.cross_attn(query_states, visual_states, routing, past_key_values)
        attended = attended + self.mlp(self.post_attn_norm(attended))
        expanded = self.output_expander(attended)
        # RMSNorm without a weight: the gate alone sets the size of what is injected.
        expanded = nn.functional.rms_norm(expanded.float(), expanded.shape[-1:], eps=self.eps)
        return (self.gate_alpha * expanded).to(hidden_states.dtype)


def pvm_blocks(model: nn.Module) -> dict[int, Qwen3VLPVMBlock]:
    """The branches of a model by decoder layer; empty for a stock one. The last of peft's two copies trains."""
    return {m.cross_attn.layer_idx: m for m in model.modules() if isinstance(m, Qwen3VLPVMBlock)}


class Qwen3VLPVMTextDecoderLayer(Qwen3VLTextDecoderLayer):
    """A stock decoder layer with a branch beside its FFN."""

    def __init__(self, config: Qwen3VLPVMTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.pvm_block = Qwen3VLPVMBlock(config, layer_idx)

    def __call__(self, hidden_states, *, visual_embeds=None, **kwargs):
        # Reentrant gradient checkpointing differentiates positional arguments only, and nothing at all unless one of
        # them requires grad: the visual embeddings go by position, and the stream starts to require grad here, in the
        # first layer that trains, not in the frozen layers below.
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if not hidden_states.requires_grad:
                hidden_states = hidden_states.detach().requires_grad_()
        return super().__call__(hidden_states, visual_embeds, **kwargs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        visual_embeds: torch.Tensor | None = None,
        visual_routing: VisualRouting | None = None,
        past_key_values: Cache | None = None,
        use_pvm: bool | Collection[int] = True,
        **kwargs,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` `[batch, sequence, hidden_size]`): the residual stream.
            visual_embeds (`torch.Tensor` `[batch, new visual, hidden_size]`, *optional*): visual tokens of this pass.
            visual_routing (`VisualRouting`, *optional*): who reads what; `None` if there is nothing to read.
            use_pvm (`bool` or `Collection[int]`): whether the branch is on, or in which layers it is. Off, it still
                remembers, for later passes on the same cache.
        """
        is_on = use_pvm if isinstance(use_pvm, bool) else self.pvm_block.cross_attn.layer_idx in use_pvm
        if visual_routing is None or not is_on:
            hidden_states = super().forward(hidden_states, past_key_values=past_key_values, **kwargs)
            if visual_embeds is not None and past_key_values is not None:
                self.pvm_block(None, visual_embeds, visual_routing, past_key_values)
            return hidden_states

        attn_output, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), past_key_values=past_key_values, **kwargs
        )
        hidden_states = hidden_states + attn_output

        query_index, queries = visual_routing.query_index, hidden_states
        if query_index is not None:
            query_index = query_index[..., None].expand(-1, -1, hidden_states.shape[-1])
            queries = hidden_states.gather(1, query_index)
        injected = self.pvm_block(queries, visual_embeds, visual_routing, past_key_values)

        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        if query_index is None:
            return hidden_states + injected
        return hidden_states.scatter_add(1, query_index, injected)


def _base_hub_kwargs(config: Qwen3VLPVMConfig, download_kwargs: dict) -> dict:
    """How to get the base: as the adapter, but for what says which files of a repository are meant."""
    kwargs = {key: value for key, value in download_kwargs.items() if key not in ("commit_hash", "tqdm_class")}
    trained_on = (config.get_text_config().pvm_training or {}).get("base_model")
    # A commit of the one that it was trained on says nothing of a mirror.
    is_other = trained_on not in (None, config.base_model_name_or_path)
    trained_revision = (config.get_text_config().pvm_training or {}).get("base_revision")
    revision = None if is_other and config.base_model_revision == trained_revision else config.base_model_revision
    return {**kwargs, "revision": revision or "main", "subfolder": ""}


def _check_base(config: Qwen3VLPVMConfig, adapter: str, download_kwargs: dict, is_quantized: bool) -> None:
    """
    Raises:
        OSError: if the base has no config.
        ValueError: if its decoder or vision tower is of another shape than the adapter's config says, or one of the
            two is stored quantised and the other not.
    """
    name = config.base_model_name_or_path
    try:
        base = type(config).from_pretrained(name, **_base_hub_kwargs(config, download_kwargs))
    except OSError as error:
        raise OSError(_no_base(config, adapter, error)) from error
    different = [
        f"{part}.{key} is {getattr(theirs, key)} and not {getattr(ours, key)}"
        for part, theirs, ours in (
            ("config", base, config),
            ("text_config", base.text_config, config.text_config),
            ("vision_config", base.vision_config, config.vision_config),
        )
        for key in SHAPE[part]
        if getattr(theirs, key) != getattr(ours, key)
    ]
    if different:
        raise ValueError(
            f"{name} is not the base of {adapter}, but a model of another shape: {'; '.join(different)}. Name the "
            "right one with `base_model_name_or_path=...`."
        )
    if ("quantization_config" in base) != is_quantized:
        raise ValueError(
            f"The weights of {name} are stored {'' if not is_quantized else 'not '}quantised, and {adapter} goes into "
            f"{'quantised' if is_quantized else 'plain'} ones. Name such a base; to quantise a plain one while it is "
            "loaded, pass `quantization_config=...`."
        )


def safetensors_files(name: str, **hub_kwargs) -> list[str]:
    """
    The files with the weights of a whole checkpoint, downloaded if need be.

    Raises:
        OSError: if there are none.
    """
    try:
        return [cached_file(name, SAFE_WEIGHTS_NAME, **hub_kwargs)]
    except OSError:
        index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **hub_kwargs)
        return get_checkpoint_shard_files(name, index, **hub_kwargs)[0]


def _base_files(config: Qwen3VLPVMConfig, adapter: str, download_kwargs: dict) -> list[str]:
    """The files of an adapter's base. Warns if they are not those that it was trained on."""
    name = config.base_model_name_or_path
    try:
        files = safetensors_files(name, **_base_hub_kwargs(config, download_kwargs))
    except OSError as error:
        raise OSError(_no_base(config, adapter, error)) from error

    mark = config.get_text_config().pvm_training or {}
    trained_on, revision = mark.get("base_revision"), extract_commit_hash(files[0], None)
    if trained_on is not None and trained_on != revision:
        found = f"revision {revision}" if revision else "a copy whose revision is not known"
        logger.warning(
            f"{adapter} was trained on revision {trained_on} of {mark.get('base_model')}, and is put into {found} of "
            f"{name}. If the weights differ, so do its answers."
        )
    return files


def _no_base(config: Qwen3VLPVMConfig, adapter: str, error: OSError) -> str:
    return (
        f"{adapter} holds PVM branches only, and the base that they go into, {config.base_model_name_or_path}, cannot "
        f"be had: {str(error).partition(chr(10))[0]} If it lies elsewhere, say where with "
        "`base_model_name_or_path=...`."
    )


def _check_gates(model: nn.Module, name: str) -> None:
    """
    Raises:
        ValueError: if a gate is not finite or above `MAX_GATE`, or all are 0 although the branches were trained.
    """
    gates = {
        module.cross_attn.layer_idx: module.gate_alpha
        for module in model.modules()
        if isinstance(module, Qwen3VLPVMBlock)
    }
    # Weights offloaded to disk, or held by another rank, cannot be looked at here.
    gates = {layer: gate for layer, gate in gates.items() if gate.device.type != "meta" and gate.numel() > 0}
    for layer, gate in gates.items():
        if not gate.abs() <= MAX_GATE:  # which NaN is not, either
            raise ValueError(
                f"{name}: the gate of layer {layer} is {gate.item()}, and no trained gate is above {MAX_GATE:g} in "
                "magnitude. The file is damaged, or the training that wrote it diverged."
            )
    mark = model.config.get_text_config().pvm_training
    if mark is not None and gates and not any(gate.any() for gate in gates.values()):
        raise ValueError(
            f"{name} says that its PVM branches were trained ({mark}), but all gates are exactly 0, so it would "
            "answer as the stock model. Its weights are not the trained ones."
        )


class Qwen3VLPVMPreTrainedModel(Qwen3VLPreTrainedModel):
    config: Qwen3VLPVMConfig
    _no_split_modules = ["Qwen3VLTextDecoderLayer", "Qwen3VLPVMTextDecoderLayer", "Qwen3VLVisionBlock"]
    _can_record_outputs = {
        "hidden_states": Qwen3VLTextDecoderLayer,
        "attentions": Qwen3VLTextAttention,
        "pvm_attentions": Qwen3VLPVMCrossAttention,
    }
    # Left alone by every kind of quantisation, and float32 over a float16 backbone.
    _keep_in_fp32_modules = [r".*\.pvm_block"]
    # `_load_pretrained_model` says which branches are missing, and whether they may be.
    _keys_to_ignore_on_load_missing = [r"\.pvm_block\."]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # The gate alone is zero: the model starts as the stock one, and the gate has a gradient from the first step.
        # (Were the output projection zero as well, no parameter of the branch would ever get one.)
        if isinstance(module, Qwen3VLPVMBlock):
            init.zeros_(module.gate_alpha)

    def enable_input_require_grads(self):
        """
        What `gradient_checkpointing_enable()` calls so that frozen layers pass gradients on. Branches see to that
        themselves, so here the embeddings require grad only while something below the first branch trains.
        """
        decoder = next(module for module in self.modules() if isinstance(module, Qwen3VLPVMTextModel))
        below = decoder.layers[: min(decoder.config.pvm_layers)]

        def require_grads(module, args, output):
            if any(parameter.requires_grad for parameter in below.parameters()):
                output.requires_grad_(True)

        self._require_grads_hooks = [decoder.embed_tokens.register_forward_hook(require_grads)]

    def save_pretrained(self, save_directory: str | os.PathLike, adapter_only: bool = False, **kwargs):
        """
        As the stock model, with what `trust_remote_code` needs: the code files and a complete `auto_map`.

        Args:
            save_directory (`str` or `os.PathLike`): the folder.
            adapter_only (`bool`): write the branches alone, to be loaded into the base that the config names. What was
                changed in the backbone is not in it.

        Raises:
            ValueError: if an adapter has no base, is pushed with a base that only this machine has, or the model holds
                a PEFT adapter, of which transformers would save nothing else.
        """
        config = copy.deepcopy(self.config)
        config.auto_map = dict(AUTO_MAP)
        if self._hf_peft_config_loaded:
            raise ValueError(
                "The model holds a PEFT adapter, and transformers would save that alone, without the branches. Merge "
                "it first: `python -m pvm convert CHECKPOINT FOLDER --to full` does."
            )
        if adapter_only:
            base = config.base_model_name_or_path
            if base is None:
                raise ValueError(
                    "An adapter checkpoint needs the name of its base: set `model.config.base_model_name_or_path` "
                    "(and `base_model_revision`) first."
                )
            if kwargs.get("push_to_hub") and os.path.isdir(base):
                raise ValueError(
                    f"The base is the folder {base}, which nobody else has. Set "
                    "`model.config.base_model_name_or_path` to its name on the Hub, or push everything, without "
                    "`adapter_only`."
                )
            if "quantization_config" in config and not self.hf_quantizer.pre_quantized:
                del config.quantization_config  # chosen when the base was loaded, and to be chosen then again
            state_dict = kwargs.pop("state_dict", None) or self.state_dict()
            branches = {name: weight for name, weight in state_dict.items() if ".pvm_block." in name}
            kwargs |= {"state_dict": branches, "variant": ADAPTER_VARIANT, "save_original_format": False}
        else:
            config.base_model_name_or_path = config.base_model_revision = config.peft_adapter = None

        # transformers saves what stands on the model. Branches are not quantised, whatever their base is.
        stand_ins = {"config": config}
        if adapter_only and "quantization_config" in self.config:
            stand_ins["hf_quantizer"] = None
        own = {name: vars(self)[name] for name in stand_ins}
        vars(self).update(stand_ins)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            vars(self).update(own)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """
        Load a PVM checkpoint, whole or an adapter (its base is loaded, too), a stock Qwen3-VL checkpoint (its branches
        are new, their gates zero) or one of the authors' implementation. To choose where new branches go, pass
        `config=Qwen3VLPVMConfig.from_stock(...)`; for a base that lies elsewhere, `base_model_name_or_path=...`.
        Weights are read from safetensors only.

        Raises:
            OSError: if the checkpoint or its base is not to be had.
            ValueError: if an adapter's base has another shape; if branches are incomplete, or marked as trained but
                missing or switched off; if a gate is not finite or above `MAX_GATE`.
        """
        hub_names = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
        hub_kwargs = {name: kwargs[name] for name in hub_names if name in kwargs}
        kwargs |= {"output_loading_info": True, "use_safetensors": True}
        model, loading_info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if model.config.base_model_name_or_path is not None and loading_info["missing_keys"]:
            raise ValueError(
                f"The base {model.config.base_model_name_or_path} lacks {len(loading_info['missing_keys'])} weights, "
                f"e.g. {min(loading_info['missing_keys'])}: they would be random. Get the complete checkpoint."
            )
        _check_gates(model, pretrained_model_name_or_path)
        if model.config.peft_adapter is not None:
            subfolder = "/".join(filter(None, (hub_kwargs.pop("subfolder", ""), model.config.peft_adapter)))
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                file = cached_file(pretrained_model_name_or_path, name, subfolder=subfolder, **hub_kwargs)
            peft_info = model.load_adapter(os.path.dirname(file))
            if peft_info.missing_keys:
                raise ValueError(
                    f"The PEFT adapter in {pretrained_model_name_or_path}/{subfolder} lacks weights, e.g. "
                    f"{min(peft_info.missing_keys)}: they would be random. Get the complete checkpoint."
                )
        return (model, loading_info) if output_loading_info else model

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, load_config, expected_keys=None):
        """
        What `from_pretrained` calls with the files that it found. An adapter's come on top of its base's, through
        the same loader: device maps, offloading, quantisation and sharding treat the branches as anything else.
        """
        if expected_keys is not None:  # a PEFT adapter, loaded into a model that is there
            return super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

        name, config = load_config.pretrained_model_name_or_path, model.config
        if checkpoint_files and os.path.basename(checkpoint_files[0]) == ADAPTER_WEIGHTS_NAME:
            quantizer = load_config.hf_quantizer
            _check_base(config, name, load_config.download_kwargs, quantizer is not None and quantizer.pre_quantized)
            checkpoint_files = [*_base_files(config, name, load_config.download_kwargs), *checkpoint_files]
            weight_map = {  # whose absolute paths are what offloading to disk reads
                key: os.path.abspath(file)
                for file in checkpoint_files
                for key in parse_local_safetensors_file_metadata(file).tensors
            }
            load_config = replace(load_config, sharded_metadata={"weight_map": weight_map})
        loading_info, disk_offload_index = super()._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config
        )

        missing = sorted(key for key in loading_info.missing_keys if ".pvm_block." in key)
        branches = [key for key in model.state_dict() if ".pvm_block." in key]
        mark = config.get_text_config().pvm_training
        says_so = {cls.__name__, *__all__} & {*(config.architectures or ())}
        if missing and (mark is not None or says_so or len(missing) < len(branches)):
            said = "holds PVM branches" if mark is None else f"says that its PVM branches were trained ({mark})"
            raise ValueError(
                f"{name} {said}, but {len(missing)} of their {len(branches)} weights are missing, e.g. {missing[0]}: "
                "they would be random. Get the complete checkpoint; to start new branches, load the stock checkpoint "
                "that it came from."
            )
        if missing:
            logger.warning(
                f"{name} has no PVM branches: new ones are in layers {config.get_text_config().pvm_layers}. Until "
                "they are trained, the model computes what the stock model computes."
            )
        return loading_info, disk_offload_index


class Qwen3VLPVMTextModel(Qwen3VLPVMPreTrainedModel, Qwen3VLTextModel):
    """The stock decoder with a branch in the layers `config.pvm_layers`."""

    config: Qwen3VLPVMTextConfig

    def __init__(self, config: Qwen3VLPVMTextConfig):
        if config.model_type != Qwen3VLPVMTextConfig.model_type:
            raise ValueError(
                f"The config is a stock model's (`model_type: {config.model_type}`), without PVM fields. Convert "
                "it with `Qwen3VLPVMConfig.from_stock(config, pvm_layers=..., pvm_hidden_size=...)`."
            )
        super().__init__(config)
        for layer_idx in config.pvm_layers:
            self.layers[layer_idx] = Qwen3VLPVMTextDecoderLayer(config, layer_idx)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        visual_pos_masks: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPast:
        """
        Args:
            inputs_embeds (`torch.Tensor` `[batch, sequence, hidden_size]`): with the visual embeddings in place.
            visual_pos_masks (`torch.BoolTensor` `[batch, sequence]`, *optional*): where they are.
            use_pvm (`bool` or `Collection[int]`, *optional*): `False` turns the branches off in this pass: the stock
                model's hidden states; a list of layers leaves on those alone. What is seen is remembered all the same.
            output_pvm_attentions (`bool`, *optional*): adds `pvm_attentions` to the output, a tuple with the weights
                `[batch, heads, sequence, visual]` of each branch; needs eager attention.
            kwargs: as the stock text model.
        """
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds, input_ids = self.embed_tokens(input_ids), None

        record = kwargs.get("output_pvm_attentions", False)
        if record and self.config._attn_implementation != "eager":
            raise ValueError(
                f"`output_pvm_attentions=True` needs eager attention, and this model uses "
                f"{self.config._attn_implementation}. Call `model.set_attn_implementation('eager')` first."
            )

        memory = read_visual_memory(past_key_values, self.config.pvm_layers[0])
        visual_embeds = routing = None
        if visual_pos_masks is None and memory is None and self.training and torch.is_grad_enabled():
            # A batch without an image runs one silenced query through each branch, so that every parameter gets its
            # (zero) gradient: without, the loss has no gradient at all and distributed ranks wait for each other.
            visual_pos_masks = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        if visual_pos_masks is not None:
            past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
            counts = _count_tokens(attention_mask, past_length, inputs_embeds)
            if position_ids is None or position_ids.ndim == 2:
                rope_deltas = torch.zeros_like(counts)
            else:  # 3 axes, or 4 of which the first is the count
                counts = position_ids[0] if len(position_ids) == 4 else counts
                # Text goes on after the largest position so far: in an image not always that of the last token.
                reached = position_ids[-3:].amax(dim=0).cummax(dim=1).values
                rope_deltas = (reached - counts).expand_as(visual_pos_masks)
            visual_index, routing = self._route(
                visual_pos_masks, rope_deltas, memory, past_length, pack_queries=not record
            )
            visual_embeds = inputs_embeds.gather(1, visual_index[..., None].expand(-1, -1, inputs_embeds.shape[-1]))
        elif memory is not None:
            # Everything in memory came before this pass, so there is nothing to compare: no sequence length is read.
            routing = VisualRouting(memory.positions, memory.rope_deltas, memory.complete)
            if not memory.complete:
                present = memory.positions.to(inputs_embeds.device) != NO_POSITION
                reads = present.any(dim=1)[:, None, None]
                routing = routing._replace(reads=reads, mask=(present[:, None] | ~reads)[:, None])

        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            visual_pos_masks=visual_pos_masks,
            visual_embeds=visual_embeds,
            visual_routing=routing,
            **kwargs,
        )

    def _route(
        self,
        visual_mask: torch.BoolTensor,
        rope_deltas: torch.LongTensor,
        memory: VisualMemory | None,
        past_length: int | torch.LongTensor,
        pack_queries: bool,
    ) -> tuple[torch.LongTensor, VisualRouting]:
        """
        Args:
            visual_mask (`torch.BoolTensor` `[batch, sequence]`): the visual tokens of this pass.
            rope_deltas (`torch.LongTensor` `[batch, sequence]`): rotary position minus number of tokens.
            memory (`VisualMemory`, *optional*): those of earlier passes.
            past_length (`int` or 0-dim `torch.LongTensor`): length of the sequence before this pass.
            pack_queries (`bool`): send only text tokens that see something through the branch, not every token.

        Returns:
            The indices of the visual tokens of this pass, `[batch, new visual]`, padded with indices of other tokens
            where a row has fewer, and the routing.
        """
        positions = torch.arange(visual_mask.shape[1], device=visual_mask.device) + past_length
        visual_index, present = _pack(visual_mask)
        visual_positions = positions[visual_index].masked_fill(~present, NO_POSITION).int()
        rope_deltas = rope_deltas.gather(1, visual_index).int()
        if memory is not None:
            visual_positions = torch.cat([memory.positions.to(visual_positions.device), visual_positions], dim=1)
            rope_deltas = torch.cat([memory.rope_deltas.to(rope_deltas.device), rope_deltas], dim=1)

        first, last = visual_positions.aminmax(dim=1, keepdim=True)
        if self.config.pvm_causal:
            reads = ~visual_mask & (positions > first)
        else:
            reads = ~visual_mask & (first != NO_POSITION)

        query_index = None
        query_positions = positions.expand_as(reads)
        if pack_queries:
            query_index, reads = _pack(reads)
            query_positions = positions[query_index]

        mask = None
        first_query = query_positions.masked_fill(~reads, NO_POSITION).amin(dim=1, keepdim=True)
        visible_to_all = last < first_query if self.config.pvm_causal else last != NO_POSITION
        if not (visible_to_all | ~reads.any(dim=1, keepdim=True)).all():
            if self.config.pvm_causal:
                mask = visual_positions[:, None] < query_positions[..., None]
            else:
                mask = (visual_positions != NO_POSITION)[:, None].expand(-1, query_positions.shape[1], -1)
            # A query that sees nothing is zeroed after the attention, whose softmax must not run over an empty row.
            mask = (mask | ~reads[..., None])[:, None]
        complete = bool((last != NO_POSITION).all())
        routing = VisualRouting(visual_positions, rope_deltas, complete, query_index, reads[..., None], mask)
        return visual_index, routing


def _count_tokens(
    attention_mask: torch.Tensor | None, past_length: int | torch.LongTensor, tokens: torch.Tensor
) -> torch.LongTensor:
    """
    How many tokens of its row precede each of the `tokens` (`[batch, sequence, ...]`) of this pass: `[batch or 1,
    sequence]`. Padding is not counted where the mask tells: `[batch, past + sequence]`, or longer for a static cache.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device) + past_length
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(dim=1) - 1)[:, positions].clamp(min=0)
    return positions[None]


def _pack(selected: torch.BoolTensor) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """
    Indices `[batch, n]` of the `True` entries of `selected` `[batch, sequence]`, row by row and in order, padded with
    indices of others where a row has fewer than the longest one, n >= 1; and which of them are real, `[batch, n]`.
    """
    count = selected.sum(dim=1, keepdim=True)
    longest = max(int(count.max()), 1)
    index = selected.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    return index, torch.arange(longest, device=selected.device) < count


class Qwen3VLPVMModel(Qwen3VLPVMPreTrainedModel, Qwen3VLModel):
    """The stock vision tower and the decoder with branches."""

    # Named by class, so that every save writes the code files beside the weights.
    _auto_class = "AutoModel"

    def __init__(self, config: Qwen3VLPVMConfig):
        super(Qwen3VLModel, self).__init__(config)  # not Qwen3VLModel's own, which builds the stock decoder
        self.visual = Qwen3VLVisionModel._from_config(config.vision_config)
        self.language_model = Qwen3VLPVMTextModel._from_config(config.text_config)
        self.rope_deltas = None  # what transformers reads off the stock model; here they are in the cache
        self.post_init()

    @functools.wraps(Qwen3VLModel.forward)  # the Trainer reads the signature
    def forward(self, *args, **kwargs) -> tuple | BaseModelOutputWithPast:
        """
        As the stock model.

        Raises:
            ValueError: for `inputs_embeds` into which images were merged already: nothing says where they are, and the
                branches would be off without a word; for grids without pixels, or of another pass.
        """
        given = {name for name, value in kwargs.items() if value is not None}
        # generate() of transformers 5.23 passes an empty dict of encoder outputs where there is nothing to encode.
        has_pixels = given & {"pixel_values", "pixel_values_videos"} or kwargs.get("mm_encoder_outputs")
        has_grids = given & {"image_grid_thw", "video_grid_thw"}
        has_places = has_grids or ("mm_token_type_ids" in given and kwargs["mm_token_type_ids"].any())
        if "inputs_embeds" in given and has_places and not has_pixels:
            raise ValueError(
                "`inputs_embeds` came with image or video positions but without `pixel_values`: if the visual "
                "embeddings are merged in already, the PVM branches cannot know where. Pass `pixel_values` and leave "
                "the placeholders' embeddings in `inputs_embeds`, or call the decoder, `model.model.language_model("
                "inputs_embeds=..., visual_pos_masks=..., position_ids=..., deepstack_visual_embeds=...)`."
            )
        if has_grids and not has_pixels and "position_ids" not in given:
            raise ValueError(
                "Grids of images or videos came without `pixel_values`, so the placeholders would be read as text. "
                "Pass both, or neither."
            )
        if has_pixels and "position_ids" not in given:
            # Once images are merged into embeddings, nothing tells where they were.
            input_ids = args[0] if args else kwargs.get("input_ids")
            kwargs["mm_token_type_ids"] = self._token_types(input_ids, kwargs.get("inputs_embeds"))
            self._check_grids(kwargs["mm_token_type_ids"], kwargs.get("image_grid_thw"), kwargs.get("video_grid_thw"))
        return super().forward(*args, **kwargs)

    def _token_types(self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None) -> torch.LongTensor:
        """`[batch, sequence]`: 1 for placeholders of images, 2 for those of videos, told as the stock model does."""
        if inputs_embeds is None:
            images, videos = input_ids == self.config.image_token_id, input_ids == self.config.video_token_id
        else:
            images, videos = (mask[..., 0] for mask in self.get_placeholder_mask(None, inputs_embeds))
        return images + 2 * videos

    def _check_grids(
        self,
        mm_token_type_ids: torch.LongTensor,
        image_grid_thw: torch.LongTensor | None,
        video_grid_thw: torch.LongTensor | None,
    ) -> None:
        """Raise a `ValueError` unless the grids are those of the placeholders of this pass."""
        for kind, name, grid in ((1, "image", image_grid_thw), (2, "video", video_grid_thw)):
            found = int((mm_token_type_ids == kind).sum())
            expected = 0 if grid is None else int(grid.prod(-1).sum()) // self.visual.spatial_merge_size**2
            if grid is not None and found != expected:
                raise ValueError(
                    f"`{name}_grid_thw` describes {expected} {name} tokens, but this pass has {found}. When a cache "
                    "is continued, pass pixels and grids of the new images and videos only, and as many placeholder "
                    "tokens as they have; those in the cache are remembered."
                )

    def compute_3d_position_ids(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
    ) -> torch.LongTensor | None:
        """
        Rotary positions `[3, batch, sequence]` of a pass for which none were given, `None` where tokens are merely
        counted. The stock model continues a cache by what its module remembers of the last image that any conversation
        brought; here that comes from the cache itself, and a pass that continues one may bring images of its own.

        Args:
            input_ids (`torch.LongTensor` `[batch, sequence]`, *optional*): of this pass; its placeholders tell where
                images and videos are.
            inputs_embeds (`torch.Tensor` `[batch, sequence, hidden_size]`, *optional*): in place of `input_ids`.
            mm_token_type_ids (`torch.LongTensor` `[batch, sequence]`, *optional*): 1 for image, 2 for video tokens;
                read only if there are no `input_ids`.
            image_grid_thw, video_grid_thw (`torch.LongTensor` `[images, 3]`): of the images and videos of this pass.
            attention_mask (`torch.Tensor` `[batch, past + sequence]`, *optional*): of all of the sequence; longer for
                a static cache.

        Raises:
            ValueError: if positions cannot be known, or the grids are not those of the images of this pass.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        batch_size, length = tokens.shape[:2]
        has_grids = image_grid_thw is not None or video_grid_thw is not None
        memory = read_visual_memory(past_key_values, self.config.text_config.pvm_layers[0])
        tells_padding = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        if memory is None and not has_grids and (past_key_values is None or not tells_padding):
            return None
        if attention_mask is not None and not tells_padding:
            raise ValueError(
                "An `attention_mask` that is not of the form [batch, sequence] does not tell padding from tokens, so "
                "rotary positions cannot be counted. Pass `position_ids`."
            )
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is not None and not torch.compiler.is_compiling():
            if attention_mask.shape[1] < past_length + length:
                raise ValueError(
                    f"`attention_mask` covers {attention_mask.shape[1]} tokens, but the cache holds "
                    f"{int(past_length)} and this pass has {length}. Pass the mask of all of them."
                )
        rope_delta = 0
        if memory is not None:
            rope_delta = memory.last_rope_delta.to(tokens.device)
            # A cache repeated for beams, before generate() repeats the tokens: rows side by side share their images.
            rope_delta = rope_delta[:: len(rope_delta) // batch_size]
        if not has_grids:
            return (_count_tokens(attention_mask, past_length, tokens) + rope_delta).expand(3, batch_size, -1)

        types = mm_token_type_ids if input_ids is None else self._token_types(input_ids, None)
        self._check_grids(types, image_grid_thw, video_grid_thw)
        mask = None
        past_tokens = past_length
        if attention_mask is not None:
            past_tokens = attention_mask[:, :past_length].sum(dim=1, keepdim=True)
            mask = attention_mask[:, past_length : past_length + length].bool()
            mask = mask | ~mask.any(dim=1, keepdim=True)  # the stock method wants some tokens in every row
        position_ids, _ = self.get_rope_index(types, types, image_grid_thw, video_grid_thw, mask)
        return position_ids + past_tokens + rope_delta


class Qwen3VLPVMForConditionalGeneration(Qwen3VLPVMPreTrainedModel, Qwen3VLForConditionalGeneration, GenerationMixin):
    """
    Qwen3-VL with Persistent Visual Memory and its language modelling head.

    Example:

    ```python
    >>> from transformers import AutoModelForImageTextToText

    >>> model = AutoModelForImageTextToText.from_pretrained("path/to/pvm-checkpoint", trust_remote_code=True)
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _auto_class = "AutoModelForImageTextToText"

    def __init__(self, config: Qwen3VLPVMConfig):
        super(Qwen3VLForConditionalGeneration, self).__init__(config)  # not its own, which builds the stock model
        self.model = Qwen3VLPVMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @functools.wraps(Qwen3VLForConditionalGeneration.forward)  # generate() and the Trainer read the signature
    def forward(self, *args, **kwargs):
        if kwargs.get("output_pvm_attentions"):
            raise ValueError(
                "The stock model's output has no place for the branches' attention. Call the backbone: "
                "`model.model(..., output_pvm_attentions=True).pvm_attentions` (needs transformers newer than 5.16)."
            )
        return super().forward(*args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids, *, inputs_embeds=None, use_pvm: bool | Collection[int] = True, **kwargs
    ):
        """As the stock model; what `generate()` is to accept must be named here."""
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, use_pvm=use_pvm, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """
        What `generate()` calls for the whole prompt: `[4, batch, past + new]`, the counted positions and the rotary
        ones. As the stock model's, but those of a continued cache come from that cache.
        """
        counts = super(Qwen3VLForConditionalGeneration, self)._prepare_position_ids_for_generation(
            inputs_tensor, model_kwargs
        )
        cache = model_kwargs.get("past_key_values")
        past_length = 0 if cache is None else int(cache.get_seq_length())
        new_length = counts.shape[1] - past_length
        if new_length < 1:
            raise ValueError(
                f"The cache holds {past_length} tokens, and `attention_mask` covers only {counts.shape[1]}. To "
                "continue a cache, pass all tokens, or the new ones with the `attention_mask` of all."
            )
        new_tokens = inputs_tensor[:, -new_length:]
        input_ids, inputs_embeds = (new_tokens, None) if new_tokens.ndim == 2 else (None, new_tokens)
        new_positions = self.model.compute_3d_position_ids(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            image_grid_thw=model_kwargs.get("image_grid_thw"),
            video_grid_thw=model_kwargs.get("video_grid_thw"),
            attention_mask=model_kwargs.get("attention_mask"),
            past_key_values=cache,
            mm_token_type_ids=self.model._token_types(input_ids, inputs_embeds),
        )
        position_ids = counts.expand(4, inputs_tensor.shape[0], -1).clone()
        if new_positions is not None:
            position_ids[1:, :, past_length:] = new_positions
        return position_ids


__all__ = [
    "Qwen3VLPVMForConditionalGeneration",
    "Qwen3VLPVMModel",
    "Qwen3VLPVMPreTrainedModel",
    "Qwen3VLPVMTextModel",
]
