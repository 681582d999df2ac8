# Copyright 2026 The Qwen3-VL PVM authors. Licensed under the Apache License, Version 2.0.
"""
Workaround for a limit of stock Qwen3-VL, to be removed once transformers can do it: rotary positions (M-RoPE) of a
pass that continues a cache. The stock model keeps the offset of the last image that any conversation brought on its
module, and cannot place a new image behind a cache. Here the offset comes from the visual memory of the cache.
"""

import torch


try:
    from .cache_qwen3vl_pvm import get_visual_memory
except ImportError:  # in a checkout, where this file is a top-level module
    from cache_qwen3vl_pvm import get_visual_memory


def count_tokens(attention_mask, past_length, tokens: torch.Tensor) -> torch.LongTensor:
    """
    `[batch or 1, sequence]`: number of tokens before each of the `tokens` `[batch, sequence, ...]` of this pass.
    Padding is not counted if the mask shows it: `[batch, past + sequence]`, or longer for a static cache.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device) + past_length
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(dim=1) - 1)[:, positions].clamp(min=0)
    return positions[None]


def rope_deltas(position_ids, attention_mask, past_length, inputs_embeds) -> torch.LongTensor:
    """
    `[batch or 1, sequence]`: rotary position of text that would follow each token, minus the number of tokens up to
    it. `position_ids` in any form of the stock text model: none, 2D, 3 axes, or 4 of which the first is the count.
    """
    counts = count_tokens(attention_mask, past_length, inputs_embeds)
    if position_ids is None or position_ids.ndim == 2:
        return torch.zeros_like(counts)
    counts = position_ids[0] if len(position_ids) == 4 else counts
    # Text continues after the largest position so far, which in an image need not be that of the last token.
    return position_ids[-3:].amax(dim=0).cummax(dim=1).values - counts


class CachedRopeMixin:
    """Rotary positions for `Qwen3VLPVMModel`."""

    def token_types(self, input_ids, inputs_embeds) -> torch.LongTensor:
        """`[batch, sequence]`: 1 for placeholders of images, 2 for those of videos, as the stock model finds them."""
        if inputs_embeds is None:
            images, videos = input_ids == self.config.image_token_id, input_ids == self.config.video_token_id
        else:
            images, videos = (mask[..., 0] for mask in self.get_placeholder_mask(None, inputs_embeds))
        return images + 2 * videos

    def check_grids(self, mm_token_type_ids, image_grid_thw, video_grid_thw) -> None:
        """Raise a `ValueError` unless the grids match the placeholders of this pass."""
        for kind, name, grid in ((1, "image", image_grid_thw), (2, "video", video_grid_thw)):
            found = int((mm_token_type_ids == kind).sum())
            expected = 0 if grid is None else int(grid.prod(-1).sum()) // self.visual.spatial_merge_size**2
            if grid is not None and found != expected:
                raise ValueError(
                    f"`{name}_grid_thw` describes {expected} {name} tokens, but this pass has {found}. To continue a "
                    "cache, pass pixels, grids and placeholders of new images and videos only; those in the cache are "
                    "remembered."
                )

    def compute_3d_position_ids(
        self,
        input_ids,
        inputs_embeds,
        image_grid_thw=None,
        video_grid_thw=None,
        attention_mask=None,
        past_key_values=None,
        mm_token_type_ids=None,
    ) -> torch.LongTensor | None:
        """
        Overrides the stock method, with its arguments, for a pass without `position_ids`: `[3, batch, sequence]`, or
        `None` if positions are plain token counts. Raises a `ValueError` if they cannot be known.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        batch_size, length = tokens.shape[:2]
        has_grids = image_grid_thw is not None or video_grid_thw is not None
        memory = get_visual_memory(past_key_values)
        shows_padding = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        if memory is None and not has_grids and (past_key_values is None or not shows_padding):
            return None
        if attention_mask is not None and not shows_padding:
            raise ValueError(
                "Rotary positions cannot be counted from an `attention_mask` that is not of the form [batch, "
                "sequence]. Pass `position_ids`."
            )
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        if shows_padding and not torch.compiler.is_compiling() and attention_mask.shape[1] < past_length + length:
            raise ValueError(
                f"`attention_mask` covers {attention_mask.shape[1]} tokens, but the cache holds "
                f"{int(past_length)} and this pass has {length}. Pass the mask of all of them."
            )
        rope_delta = 0
        if memory is not None:
            rope_delta = memory.next_rope_delta.to(tokens.device)
            # A cache that was repeated for beams before generate() repeats the tokens: neighbours share their images.
            rope_delta = rope_delta[:: len(rope_delta) // batch_size]
        if not has_grids or (
            memory is not None and not mm_token_type_ids.any()
        ):  # then they describe what is remembered
            return (count_tokens(attention_mask, past_length, tokens) + rope_delta).expand(3, batch_size, -1)

        self.check_grids(mm_token_type_ids, image_grid_thw, video_grid_thw)
        mask, past_tokens = None, past_length
        if attention_mask is not None:
            past_tokens = attention_mask[:, :past_length].sum(dim=1, keepdim=True)
            mask = attention_mask[:, past_length : past_length + length].bool()
            mask = mask | ~mask.any(dim=1, keepdim=True)  # the stock method needs at least one token in every row
        position_ids, _ = self.get_rope_index(
            mm_token_type_ids, mm_token_type_ids, image_grid_thw, video_grid_thw, mask
        )
        return position_ids + past_tokens + rope_delta
