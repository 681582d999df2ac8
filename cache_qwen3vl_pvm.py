# Copyright 2026 The Qwen3-VL PVM authors. Licensed under the Apache License, Version 2.0.
"""
The visual memory of a conversation: the keys and values of every branch, and where in the sequence their tokens are.
The first layer of a KV cache carries it, whatever its class, so that what is done to the cache is done to the memory.

Visual tokens may leave the KV cache (eviction_qwen3vl_pvm.py). Its layers then hold fewer columns than the sequence
has tokens; their length is still that of the sequence, as it is for the sliding windows of transformers.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin


# Position of an empty slot, in rows that have fewer tokens than others of the batch: after every query.
NO_POSITION = torch.iinfo(torch.int32).max


def pack(selected: torch.BoolTensor) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """
    Indices `[batch, n]` of the `True` entries of `selected` `[batch, sequence]`, in order, padded with indices of
    other entries in rows that have fewer than the longest, n >= 1; and which of them are real, `[batch, n]`.
    """
    count = selected.sum(dim=1, keepdim=True)
    longest = max(int(count.max()), 1)
    index = selected.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    return index, torch.arange(longest, device=selected.device) < count


@dataclass
class VisualMemory:
    """
    What a conversation has seen. An offloaded cache leaves it on the accelerator: about 1 % of the cache's bytes.

    positions (`torch.IntTensor` `[batch, visual]`): of the visual tokens in the sequence; `NO_POSITION` if empty.
    rope_deltas (`torch.IntTensor` `[batch, visual]`): rotary position of text that would follow the token, minus the
        number of tokens (without padding) up to it.
    complete (`bool`): no slot is empty.
    keys, values (`dict[int, torch.Tensor]`): by decoder layer, `[batch, key_value_heads, visual, head_dim]` each, in
        the branch's dtype.
    in_kv_cache (`bool`): the KV cache may hold visual tokens, too.
    """

    positions: torch.IntTensor
    rope_deltas: torch.IntTensor
    complete: bool
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    in_kv_cache: bool = True

    @classmethod
    def extended(cls, memory: "VisualMemory | None", positions, rope_deltas, in_kv_cache: bool) -> "VisualMemory":
        """`memory` with the places of new visual tokens, whose keys and values the branches add with `update`."""
        keys, values = {}, {}
        if memory is not None:
            positions = torch.cat([memory.positions.to(positions.device), positions], dim=1)
            rope_deltas = torch.cat([memory.rope_deltas.to(rope_deltas.device), rope_deltas], dim=1)
            keys, values, in_kv_cache = memory.keys, memory.values, memory.in_kv_cache or in_kv_cache
        return cls(positions, rope_deltas, bool((positions != NO_POSITION).all()), keys, values, in_kv_cache)

    def update(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values of new visual tokens; all of the layer."""
        if layer_idx in self.keys:
            keys = torch.cat([self.keys[layer_idx], keys], dim=2)
            values = torch.cat([self.values[layer_idx], values], dim=2)
        self.keys[layer_idx], self.values[layer_idx] = keys, values
        return keys, values

    @property
    def next_rope_delta(self) -> torch.LongTensor:
        """`[batch, 1]`: rotary position minus token count for the text that follows; 0 in rows without images."""
        present = self.positions != NO_POSITION
        last = self.positions.masked_fill(~present, -1).argmax(dim=1, keepdim=True)
        return self.rope_deltas.gather(1, last).masked_fill(~present.any(dim=1, keepdim=True), 0).long()

    @property
    def image_index(self) -> torch.LongTensor:
        """`[batch, visual]`: of the image or video frame that each token is from, counted from 0 in every row."""
        present = self.positions != NO_POSITION
        last = self.positions.masked_fill(~present, -2).cummax(dim=1).values  # up to each slot
        last = nn.functional.pad(last[:, :-1], (1, 0), value=-2)
        return (present & (self.positions != last + 1)).cumsum(dim=1) - 1

    def select(self, rows: torch.LongTensor) -> "VisualMemory":
        """The memory of the given batch rows, in that order."""
        positions, rope_deltas = (index[rows.to(index.device)] for index in (self.positions, self.rope_deltas))
        return self._with(positions, rope_deltas, self.complete, lambda states: states[rows.to(states.device)])

    def crop(self, length: int) -> "VisualMemory | None":
        """The memory of the first `length` positions of the sequence; `None` if they hold no visual token."""
        positions = self.positions.masked_fill(self.positions >= length, NO_POSITION)
        kept = (positions != NO_POSITION).any(dim=0)
        if not kept.any():
            return None
        positions, rope_deltas = positions[:, kept], self.rope_deltas[:, kept]
        complete = bool((positions != NO_POSITION).all())
        return self._with(positions, rope_deltas, complete, lambda states: states[:, :, kept.to(states.device)])

    def _with(self, positions, rope_deltas, complete, change: Callable[[torch.Tensor], torch.Tensor]):
        keys, values = ({layer: change(states) for layer, states in all.items()} for all in (self.keys, self.values))
        return VisualMemory(positions, rope_deltas, complete, keys, values, self.in_kv_cache)


class VisualMemoryLayerMixin:
    """
    A cache layer of any class. The first layer of a cache also carries the memory; the others are of this class, and
    know the first, once visual tokens were left out of them.
    """

    layer_class: type[CacheLayerMixin]
    first_layer: "VisualMemoryLayerMixin | None" = None  # None: this one
    visual_memory: VisualMemory | None = None
    cached_tokens = None  # a `CachedTokens`; `None`: all

    @property
    def missing(self) -> int:
        cached_tokens = (self.first_layer or self).cached_tokens
        return 0 if cached_tokens is None else cached_tokens.missing

    def get_seq_length(self):
        return super().get_seq_length() + self.missing

    def get_mask_sizes(self, *args, **kwargs):
        length, offset = super().get_mask_sizes(*args, **kwargs)
        return length - self.missing, offset + self.missing

    def reset(self):
        super().reset()
        self.visual_memory = self.cached_tokens = None

    def crop(self, tokens_to_remove):
        columns = super().get_seq_length()
        if self.first_layer is None:
            length = self.get_seq_length()
            length = min(tokens_to_remove, length) if tokens_to_remove > 0 else length + tokens_to_remove
            if self.cached_tokens is not None:
                self.cached_tokens = self.cached_tokens.crop(length)
            if self.visual_memory is not None:
                self.visual_memory = self.visual_memory.crop(length)
        else:  # the first layer has been cropped
            length = self.first_layer.get_seq_length()
        super().crop(length - self.missing - columns)

    def keep(self, index: torch.LongTensor) -> None:
        """Reduce the layer to its columns `index` `[batch, columns]`."""

        def take(states):
            return states.take_along_dim(index.to(states.device)[:, None, :, None], dim=2)

        if vars(self).get("_quantized_keys") is None:
            self.keys, self.values = take(self.keys), take(self.values)
            return
        # An update returns all states. To make one of no tokens needs their shape.
        keys, values = self._dequantize(self._quantized_keys), self._dequantize(self._quantized_values)
        keys, values = super().update(keys[:, :, :0], values[:, :, :0])
        super().reset()
        self.is_initialized = False  # older transformers only zero the states
        super().update(take(keys), take(values))

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        carried = self.visual_memory or self.cached_tokens  # cropped to before its images, only the latter is left
        if carried is not None:
            self._select(torch.arange(len(carried.positions)).repeat_interleave(repeats))

    def _select(self, rows):
        if self.visual_memory is not None:
            self.visual_memory = self.visual_memory.select(rows)
        if self.cached_tokens is not None:
            self.cached_tokens = self.cached_tokens.select(rows)

    def __reduce__(self):
        # Pickle cannot import a class made at run time; it can remake it from the layer class that it extends.
        return _new_layer, (self.layer_class,), self.__dict__


@functools.cache
def _with_visual_memory(layer_class: type[CacheLayerMixin]) -> type[CacheLayerMixin]:
    name = f"VisualMemory{layer_class.__name__}"
    # `_layer_type` must not be inherited: transformers would use the subclass for every cache made later.
    attributes = {"layer_class": layer_class, "_layer_type": None, "__module__": __name__}
    # torch.export looks for the class in its module.
    globals()[name] = type(name, (VisualMemoryLayerMixin, layer_class), attributes)
    return globals()[name]


def _new_layer(layer_class: type[CacheLayerMixin]) -> VisualMemoryLayerMixin:
    layer_class = _with_visual_memory(layer_class)
    return layer_class.__new__(layer_class)


def memory_layer(cache: Cache, index: int = 0) -> VisualMemoryLayerMixin:
    """A layer of a cache, which is first replaced by one of a subclass that shares all its attributes."""
    layer = cache.layers[index]
    if not isinstance(layer, VisualMemoryLayerMixin):
        carrier = _new_layer(type(layer))
        carrier.__dict__ = layer.__dict__
        carrier.first_layer = memory_layer(cache) if index > 0 else None
        cache.layers[index] = layer = carrier
    return layer


def first_memory_layer(past_key_values: Cache | None) -> VisualMemoryLayerMixin | None:
    """The layer that carries the memory; `None` if no image was seen."""
    layer = past_key_values.layers[0] if past_key_values is not None and past_key_values.layers else None
    return layer if isinstance(layer, VisualMemoryLayerMixin) else None


def get_visual_memory(past_key_values: Cache | None) -> VisualMemory | None:
    """The memory that rides with a cache; `None` if it has seen no image."""
    layer = first_memory_layer(past_key_values)
    return None if layer is None else layer.visual_memory


def set_visual_memory(past_key_values: Cache, memory: VisualMemory) -> None:
    """Let the memory ride with a cache of any class."""
    memory_layer(past_key_values).visual_memory = memory
