# Copyright 2026 The Qwen3-VL PVM authors. Licensed under the Apache License, Version 2.0.
"""The kinds of branch that a checkpoint may have. To try another one, add its class to `BLOCKS` (docs/variants.md)."""

import torch
from torch import nn


try:
    from .block_qwen3vl_pvm import Qwen3VLPVMBlock, swiglu
except ImportError:  # in a checkout, where this file is a top-level module
    from block_qwen3vl_pvm import Qwen3VLPVMBlock, swiglu


class TokenGateBlock(Qwen3VLPVMBlock):
    """PVM with a gate for every token: the published scalar times 2 sigmoid(w q)."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.token_gate = nn.Linear(config.pvm_hidden_size, 1, bias=False)

    def gate(self, query_states: torch.Tensor) -> torch.Tensor:
        """`[batch, query, 1]`: between 0 and twice `gate_alpha`."""
        return self.gate_alpha * 2 * self.token_gate(query_states).sigmoid()


class ImageOrderBlock(Qwen3VLPVMBlock):
    """PVM whose memory knows the order of images and video frames: keys and values say which one they are from."""

    features = 32  # of an image's number: sines and cosines; it is the same for numbers that differ by 64

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.image_order = nn.Linear(self.features, config.pvm_hidden_size, bias=False)

    def attend(self, query_states, visual_embeds, metadata, memory) -> torch.Tensor:
        """As published, with V' + W_order f(number of the image), `[batch, new visual, pvm_hidden_size]`."""
        # Evenly spaced frequencies make f of 32 successive numbers orthogonal. With those of rotary positions, most of
        # which are low, neighbours look alike, and which image is which is learned late or never (docs/study.md).
        visual_states = None
        if visual_embeds is not None:
            frequencies = torch.arange(1, self.features, 2, device=visual_embeds.device) * torch.pi / self.features
            angles = metadata.image_index[..., None] * frequencies
            order = torch.cat([angles.sin(), angles.cos()], dim=-1).to(visual_embeds.dtype)
            visual_states = self.vision_reducer(visual_embeds) + self.image_order(order)
        return self.cross_attn(query_states, visual_states, metadata, memory)[0]


class OrderedTokenGateBlock(TokenGateBlock, ImageOrderBlock):
    """PVM with both: a gate for every token, and a memory that knows the order of images and video frames."""


class ParallelMLPBlock(Qwen3VLPVMBlock):
    """The paper's control without an image: an MLP as large as the branch, for the same tokens."""

    reads_image = False

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        removed = sum(p.numel() for part in (self.vision_reducer, self.cross_attn) for p in part.parameters())
        del self.vision_reducer, self.cross_attn
        self.mlp = swiglu(config, config.pvm_intermediate_size + removed // (3 * config.pvm_hidden_size))

    def attend(self, query_states, visual_embeds, metadata, memory) -> torch.Tensor:
        """q itself, and zero where cross-attention would have nothing to attend to."""
        return query_states if metadata.attends is None else query_states.masked_fill(~metadata.attends, 0.0)


BLOCKS = {
    "pvm": Qwen3VLPVMBlock,
    "token_gate": TokenGateBlock,
    "image_order": ImageOrderBlock,
    "ordered_token_gate": OrderedTokenGateBlock,
    "parallel_mlp": ParallelMLPBlock,
}
