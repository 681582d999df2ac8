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


BLOCKS = {"pvm": Qwen3VLPVMBlock, "token_gate": TokenGateBlock, "parallel_mlp": ParallelMLPBlock}
