"""
Branches other than the paper's, for comparisons; they are kept out of the two files that go to the Hub.

- `mlp`, the paper's control: as many parameters, at the same places, for the same tokens, but they read no image. It
  answers "is it the image, or is it the parameters?"
- `token_gate`: a gate that depends on the token, where the paper has one scalar a layer.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextMLP

from configuration_qwen3vl_pvm import Qwen3VLPVMConfig, Qwen3VLPVMTextConfig
from modeling_qwen3vl_pvm import (
    Qwen3VLPVMBlock,
    Qwen3VLPVMForConditionalGeneration,
    Qwen3VLPVMTextDecoderLayer,
    VisualMemory,
    VisualRouting,
    write_visual_memory,
)


class ParallelMLPConfig(Qwen3VLPVMConfig):
    """The config of a PVM model, under a name that no PVM class takes for its own."""

    model_type = "qwen3_vl_parallel_mlp"
    _auto_class = None


class NoAttention(nn.Module):
    """
    Stands where a branch's cross-attention stood: hands on what the text token brought. Queries before the first image
    get zero, as with attention, so that both branches act on the same tokens; to know them in a later pass, the places
    of the visual tokens, but nothing else of them, ride with the cache.
    """

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: torch.Tensor | None,
        visual_states: torch.Tensor | None,
        routing: VisualRouting,
        past_key_values: Cache | None = None,
    ) -> tuple[torch.Tensor | None, None]:
        """Arguments and result as those of [`Qwen3VLPVMCrossAttention`]; `[batch, query, pvm_hidden_size]`."""
        if visual_states is not None and past_key_values is not None:
            nothing = visual_states.new_empty(*routing.visual_positions.shape, 0)[:, None]
            places = (routing.visual_positions, routing.rope_deltas, routing.complete)
            write_visual_memory(past_key_values, self.layer_idx, VisualMemory(nothing, nothing, *places))
        if hidden_states is not None and routing.reads is not None:
            hidden_states = hidden_states.masked_fill(~routing.reads, 0.0)
        return hidden_states, None


class ParallelMLPForConditionalGeneration(Qwen3VLPVMForConditionalGeneration):
    """
    Qwen3-VL with a gated MLP beside the FFN of a few layers: PVM's block without attention, whose SwiGLU is widened by
    the parameters of what it lacks (`vision_reducer` and the attention), rounded down to a whole neuron.
    """

    config_class = ParallelMLPConfig
    _auto_class = None

    def __init__(self, config: ParallelMLPConfig):
        super().__init__(config)
        for block in self.modules():
            if isinstance(block, Qwen3VLPVMBlock):
                _take_out_the_image(block, config)
        self.post_init()


def _take_out_the_image(block: Qwen3VLPVMBlock, config: ParallelMLPConfig) -> None:
    text_config = block.cross_attn.config
    removed = sum(p.numel() for part in (block.vision_reducer, block.cross_attn) for p in part.parameters())
    wider = Qwen3VLPVMConfig.from_dict(config.to_dict()).text_config
    wider.hidden_size = text_config.pvm_hidden_size
    wider.intermediate_size = text_config.pvm_intermediate_size + removed // (3 * text_config.pvm_hidden_size)
    block.mlp = Qwen3VLTextMLP(wider)
    block.cross_attn = NoAttention(block.cross_attn.layer_idx)
    block.vision_reducer = nn.Identity()


class TokenGateConfig(Qwen3VLPVMConfig):
    """The config of a PVM model, under a name that no PVM class takes for its own."""

    model_type = "qwen3_vl_pvm_token_gate"
    _auto_class = None


class TokenGateBlock(Qwen3VLPVMBlock):
    """A branch whose gate is `gate_alpha * 2 sigmoid(w q)`: between none and twice the scalar, by the query q."""

    def __init__(self, config: Qwen3VLPVMTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.token_gate = nn.Linear(config.pvm_hidden_size, 1, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor | None,
        visual_embeds: torch.Tensor | None,
        routing: VisualRouting,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor | None:
        """Arguments and result as those of [`Qwen3VLPVMBlock`]."""
        injected = super().forward(hidden_states, visual_embeds, routing, past_key_values)
        if injected is None:
            return None
        query_states = self.input_norm(self.text_reducer(hidden_states.to(self.gate_alpha.dtype)))
        return injected * (2 * self.token_gate(query_states).sigmoid()).to(injected.dtype)


class TokenGateForConditionalGeneration(Qwen3VLPVMForConditionalGeneration):
    """PVM with a token-wise gate in each branch; as PVM, it starts as the stock model, because `gate_alpha` is 0."""

    config_class = TokenGateConfig
    _auto_class = None

    def __init__(self, config: TokenGateConfig):
        super().__init__(config)
        for layer in self.modules():
            if isinstance(layer, Qwen3VLPVMTextDecoderLayer):
                layer.pvm_block = TokenGateBlock(config.text_config, layer.pvm_block.cross_attn.layer_idx)
        self.post_init()


VARIANTS = {"mlp": ParallelMLPForConditionalGeneration, "token_gate": TokenGateForConditionalGeneration}
# Kinds of checkpoint whose branches read the image.
WITH_MEMORY = ("pvm", "token_gate")
