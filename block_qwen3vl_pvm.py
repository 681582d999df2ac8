# Copyright 2026 The Qwen3-VL PVM authors. Licensed under the Apache License, Version 2.0.
"""
The branch of Persistent Visual Memory (PVM, arXiv 2605.00814): a gated cross-attention from text tokens to the visual
embeddings V as they entered the decoder. With x the residual stream of a text token after self-attention,

    q      = RMSNorm(W_text x)                       hidden_size -> pvm_hidden_size
    V'     = W_vision V                              hidden_size -> pvm_hidden_size
    a      = CrossAttention(q; keys and values of V')
    h      = a + SwiGLU(RMSNorm(a))
    branch = gate * RMSNorm(W_out h)                 pvm_hidden_size -> hidden_size

q enters only through a, and nothing after a has a bias: a token that attends to nothing gets exactly zero.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLTextMLP,
    Qwen3VLTextRMSNorm,
    eager_attention_forward,
)


try:
    from .cache_qwen3vl_pvm import VisualMemory
    from .configuration_qwen3vl_pvm import Qwen3VLPVMTextConfig
except ImportError:  # in a checkout, where this file is a top-level module
    from cache_qwen3vl_pvm import VisualMemory
    from configuration_qwen3vl_pvm import Qwen3VLPVMTextConfig


class CrossAttentionMetadata(NamedTuple):
    """Cross-attention metadata of one forward pass, shared by all branches."""

    # `[batch, query]`: the tokens of this pass that go through the branches; `None`: all.
    query_index: torch.LongTensor | None = None
    # `[batch, query or 1, 1]`: queries that attend to any visual token; `None`: all.
    attends: torch.BoolTensor | None = None
    # `[batch, 1, query or 1, visual]`: who attends to whom; `None`: all to all.
    mask: torch.BoolTensor | None = None
    # `[batch, new visual]`: number of the image, or frame of a video, that each new visual token is from.
    image_index: torch.LongTensor | None = None


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
        query_states: torch.Tensor,
        visual_states: torch.Tensor | None,
        metadata: CrossAttentionMetadata,
        memory: VisualMemory | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            query_states (`torch.Tensor` `[batch, query, pvm_hidden_size]`): the text tokens.
            visual_states (`torch.Tensor` `[batch, new visual, pvm_hidden_size]`, *optional*): of this pass.
            memory (`VisualMemory`, *optional*): of the cache. At least one of the two is given.

        Returns:
            `[batch, query, pvm_hidden_size]`, exactly zero for a query that attends to nothing; and, with eager
            attention, the weights `[batch, heads, query, visual]`.
        """
        query = self.q_norm(self.q_proj(query_states).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        if visual_states is None:
            key, value = memory.keys[self.layer_idx], memory.values[self.layer_idx]
        else:
            key = self.k_norm(self.k_proj(visual_states).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
            value = self.v_proj(visual_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            if memory is not None:
                key, value = memory.update(self.layer_idx, key, value)

        implementation, mask = self.config._attn_implementation, metadata.mask
        if implementation != "eager" and (mask is not None or query.dtype == torch.float32):
            implementation = "sdpa"  # flash attention takes neither a mask of this form nor float32
        elif mask is not None:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        attn_output, attn_weights = attention_interface(
            self, query, key, value, mask, dropout=dropout, scaling=self.scaling
        )
        attn_output = self.o_proj(attn_output.flatten(2))
        if metadata.attends is not None:  # o_proj may have a bias
            attn_output = attn_output.masked_fill(~metadata.attends, 0.0)
            if attn_weights is not None:
                attn_weights = attn_weights.masked_fill(~metadata.attends[:, None], 0.0)
        return attn_output, attn_weights


def swiglu(config: Qwen3VLPVMTextConfig, intermediate_size: int) -> Qwen3VLTextMLP:
    """The backbone's MLP at the branch's width."""
    sizes = {"hidden_size": config.pvm_hidden_size, "intermediate_size": intermediate_size}
    return Qwen3VLTextMLP(SimpleNamespace(**sizes, hidden_act=config.hidden_act))


class Qwen3VLPVMBlock(nn.Module):
    """Persistent Visual Memory as published, with the parameter names of the authors' implementation."""

    reads_image = True  # whether the branch depends on what the image shows

    def __init__(self, config: Qwen3VLPVMTextConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.text_reducer = nn.Linear(config.hidden_size, config.pvm_hidden_size, bias=False)
        self.vision_reducer = nn.Linear(config.hidden_size, config.pvm_hidden_size, bias=False)
        self.input_norm = Qwen3VLTextRMSNorm(config.pvm_hidden_size, eps=config.rms_norm_eps)
        self.cross_attn = Qwen3VLPVMCrossAttention(config, layer_idx)
        self.post_attn_norm = Qwen3VLTextRMSNorm(config.pvm_hidden_size, eps=config.rms_norm_eps)
        self.mlp = swiglu(config, config.pvm_intermediate_size)
        self.output_expander = nn.Linear(config.pvm_hidden_size, config.hidden_size, bias=False)
        self.gate_alpha = nn.Parameter(torch.zeros(1))
        self.eps = config.rms_norm_eps

    # Variants override these two.
    def gate(self, query_states: torch.Tensor) -> torch.Tensor:
        """From q, `[batch, query, pvm_hidden_size]`, to the gate, `[batch, query, 1]` or what broadcasts to it."""
        return self.gate_alpha

    def attend(self, query_states, visual_embeds, metadata, memory) -> torch.Tensor:
        """From q and V to a, `[batch, query, pvm_hidden_size]`."""
        visual_states = None if visual_embeds is None else self.vision_reducer(visual_embeds)
        return self.cross_attn(query_states, visual_states, metadata, memory)[0]

    def forward(
        self,
        hidden_states: torch.Tensor,
        visual_embeds: torch.Tensor | None,
        metadata: CrossAttentionMetadata,
        memory: VisualMemory | None = None,
    ) -> torch.Tensor:
        """From x `[batch, query, hidden_size]` and the new V `[batch, new visual, hidden_size]` to the branch."""
        # The branch may have another dtype than the backbone: float32 in training.
        dtype = self.gate_alpha.dtype
        query_states = self.input_norm(self.text_reducer(hidden_states.to(dtype)))
        visual_embeds = None if visual_embeds is None else visual_embeds.to(dtype)
        attended = self.attend(query_states, visual_embeds, metadata, memory)
        attended = attended + self.mlp(self.post_attn_norm(attended))
        expanded = self.output_expander(attended)
        # RMSNorm without a weight: the gate alone sets the size of the branch.
        expanded = nn.functional.rms_norm(expanded.float(), expanded.shape[-1:], eps=self.eps)
        return (self.gate(query_states) * expanded).to(hidden_states.dtype)


def pvm_blocks(model: nn.Module) -> dict[int, Qwen3VLPVMBlock]:
    """The branches of a model by decoder layer; of the two copies that peft makes, the trained one."""
    return {module.layer_idx: module for module in model.modules() if isinstance(module, Qwen3VLPVMBlock)}
