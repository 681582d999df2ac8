# Copyright 2026 The Qwen3-VL PVM authors. Licensed under the Apache License, Version 2.0.
"""
A KV cache without images. Branches have a memory of their own, so visual tokens may leave the KV cache ("evict") or
never enter it ("skip").
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import logging


try:
    from .cache_qwen3vl_pvm import NO_POSITION, first_memory_layer, get_visual_memory, memory_layer, pack
except ImportError:  # in a checkout, where this file is a top-level module
    from cache_qwen3vl_pvm import NO_POSITION, first_memory_layer, get_visual_memory, memory_layer, pack


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class CachedTokens:
    """
    The tokens of a sequence that are in the KV cache, as far as visual tokens were left out. Later tokens are all
    there, in later columns.

    positions (`torch.LongTensor` `[batch, columns]`): of the tokens in the sequence, ascending; `NO_POSITION` behind
        them in rows that hold fewer.
    length (`int`): of the sequence that the columns stand for.
    """

    positions: torch.LongTensor
    length: int

    @property
    def missing(self) -> int:
        """Number of columns by which the cache is shorter than the sequence."""
        return self.length - self.positions.shape[1]

    def until(self, length: int) -> torch.LongTensor:
        """`[batch, columns]`: positions of all columns of a sequence that has grown to `length` tokens."""
        later = torch.arange(self.length, length, device=self.positions.device)
        return torch.cat([self.positions, later.expand(len(self.positions), -1)], dim=1)

    def mask(self, attention_mask: torch.Tensor | None, length: int) -> torch.BoolTensor:
        """
        `attention_mask` `[batch, sequence]` (`None`: no padding) for the first `length` tokens, by columns. In front
        are `missing` columns for those that are not there: masks count from the start of the sequence.
        """
        positions = self.until(length)
        mask = positions != NO_POSITION
        if attention_mask is not None:
            mask &= attention_mask.to(mask.device).bool().gather(1, positions.clamp(max=length - 1))
        return nn.functional.pad(mask, (self.missing, 0))

    def select(self, rows: torch.LongTensor) -> "CachedTokens":
        return replace(self, positions=self.positions[rows.to(self.positions.device)])

    def crop(self, length: int) -> "CachedTokens":
        if length >= self.length:
            return self
        kept = self.positions < length
        columns = int(kept.sum(dim=1).max())
        return CachedTokens(self.positions.masked_fill(~kept, NO_POSITION)[:, :columns], length)

    @classmethod
    def of(cls, past_key_values: Cache | None) -> "CachedTokens | None":
        """Those of a cache; `None` if it holds all tokens."""
        layer = first_memory_layer(past_key_values)
        return None if layer is None else layer.cached_tokens

    @classmethod
    def all(cls, length: int, batch_size: int, device: torch.device) -> "CachedTokens":
        return cls(torch.arange(length, device=device).expand(batch_size, -1), length)

    def set(self, past_key_values: Cache) -> None:
        """Say that a cache holds these."""
        for index in range(len(past_key_values.layers)):
            memory_layer(past_key_values, index)
        memory_layer(past_key_values).cached_tokens = self


def evict_images(past_key_values: Cache, attention_mask: torch.Tensor | None = None) -> None:
    """
    Take keys and values of visual tokens and padding out of every layer of a cache. Branches keep their memory.

    Args:
        past_key_values (`Cache`): that can shrink, as dynamic, offloaded and quantised ones can.
        attention_mask (`torch.Tensor` `[batch, sequence]`, *optional*): of all tokens so far.
    """
    memory = get_visual_memory(past_key_values)
    if memory is None or not memory.in_kv_cache:
        return
    length, device = past_key_values.get_seq_length(), memory.positions.device
    batch_size = len(memory.positions)
    cached = CachedTokens.of(past_key_values) or CachedTokens.all(length, batch_size, device)
    visual = torch.zeros(batch_size, length + 1, dtype=torch.bool, device=device)
    visual.scatter_(1, memory.positions.clamp(max=length).long(), True)  # the last column is for empty slots

    positions = cached.until(length)
    kept = cached.mask(attention_mask, length)[:, cached.missing :] & ~visual.gather(1, positions.clamp(max=length))
    index, present = pack(kept)
    CachedTokens(positions.gather(1, index).masked_fill(~present, NO_POSITION), length).set(past_key_values)
    for layer in past_key_values.layers:
        layer.keep(index)
    past_key_values.layers[0].visual_memory = replace(memory, in_kv_cache=False)


def check_image_kv_cache(
    image_kv_cache: str, has_images: bool, attention_mask: torch.Tensor | None, past_key_values: Cache | None
) -> None:
    """Raise a `ValueError` for a pass that cannot do without images in its cache."""
    if image_kv_cache not in ("keep", "evict", "skip"):
        raise ValueError(f"`image_kv_cache={image_kv_cache!r}`: pass 'keep', 'evict' or 'skip'.")
    if CachedTokens.of(past_key_values) is None and (image_kv_cache == "keep" or not has_images):
        return
    if past_key_values is None and image_kv_cache == "evict":
        raise ValueError("`image_kv_cache='evict'` needs a cache: leave `use_cache=False` out, or pass 'skip'.")
    if past_key_values is not None and (past_key_values.is_compileable or any(past_key_values.is_sliding)):
        raise ValueError(
            f"`image_kv_cache={image_kv_cache!r}` needs a cache that can shrink, not a static or sliding one: leave "
            "`cache_implementation` out, or pass a DynamicCache."
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError("`image_kv_cache` needs an `attention_mask` of the form [batch, sequence].")


def warn_without_image_dropout(training: dict | None) -> None:
    """Warn once if a checkpoint's branches were not trained to carry the image; `training` is its metadata."""
    if training is not None and not training.get("image_dropout"):
        logger.warning_once(
            "This checkpoint was trained without image dropout, so its branches may not carry the image that is taken "
            "from self-attention: in our tests such a model lost 61.6 points of accuracy, and one that was trained "
            "with `--image_dropout` none."
        )
