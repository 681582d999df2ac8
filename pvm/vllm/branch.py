"""
The branch on vLLM's paged KV cache.

vLLM computes one token per slot of its cache, and attention runs over all slots of a sequence up to the query. So the
branch is one more causal attention over the sequence, in which text keys are masked by an additional dimension:

    query  [ q,   40 ]      key  [ k,  0 if visual, -256 if text ]      value  [ v or 0,  1 if visual, 0 if text ]

Text keys vanish in the softmax, also behind a cached prefix, after a preemption and in any chunk, because the mask is
stored with the keys. The additional dimension of the result says whether the query sees any image.
"""

import torch
from torch import nn
from vllm.config import CacheConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.v1.attention.backend import AttentionBackend

from block_qwen3vl_pvm import CrossAttentionMetadata, Qwen3VLPVMCrossAttention
from configuration_qwen3vl_pvm import Qwen3VLPVMTextConfig
from variants_qwen3vl_pvm import BLOCKS


# Exact in fp8, too. Times the attention's scale they are below -900 for heads of up to 128.
QUERY_MARK, TEXT_KEY_MARK = 40.0, -256.0


class VisualTokens(nn.Module):
    """
    The visual tokens of a step: buffers at fixed addresses (for CUDA graphs), written before the decoder runs.

    mask (`torch.BoolTensor` `[max_num_batched_tokens, 1]`): where they are.
    image_index (`torch.LongTensor` `[max_num_batched_tokens]`): which image or video frame of their prompt they are
        from, counted from 0.
    embeds (`torch.Tensor` `[max_num_batched_tokens, hidden_size]`): what enters the decoder, of all tokens. A copy,
        because vLLM's norms overwrite it.
    """

    def __init__(self, max_num_tokens: int, hidden_size: int):
        super().__init__()
        self.register_buffer("mask", torch.zeros(max_num_tokens, 1, dtype=torch.bool), persistent=False)
        self.register_buffer("image_index", torch.zeros(max_num_tokens, dtype=torch.long), persistent=False)
        self.register_buffer("embeds", torch.zeros(max_num_tokens, hidden_size), persistent=False)


class VisualAttention(nn.Module):
    """Paged causal attention to visual tokens. (Not divided by tensor parallelism: see docs/serving.md.)"""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        backend: type[AttentionBackend],
        cache_config: CacheConfig,
        prefix: str,
    ):
        super().__init__()
        self.head_dim = head_dim
        # The smallest that the backbone's attention backend takes; none is smaller than 32.
        sizes = range(max(head_dim + 8, 32), 513, 8)
        self.head_size = next(size for size in sizes if backend.supports_head_size(size))
        self.attn = Attention(
            num_heads,
            self.head_size,
            head_dim**-0.5 if head_dim else 1.0,
            num_kv_heads,
            cache_config=cache_config,
            prefix=f"{prefix}.attn",
            attn_backend=backend,
        )

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_visual: torch.BoolTensor
    ) -> tuple[torch.Tensor, torch.BoolTensor]:
        """
        Args:
            query (`torch.Tensor` `[tokens, heads, head_dim]`), key, value (`[tokens, key/value heads, head_dim]`):
                of all tokens of the step; keys and values of text do not matter.
            is_visual (`torch.BoolTensor` `[tokens, 1]`).

        Returns:
            `[tokens, heads * head_dim]`, and whether there was anything to attend to, `[tokens, 1]`.
        """
        is_visual = is_visual[..., None].to(query.dtype)
        output = self.attn(
            self._extend(query, torch.full_like(is_visual, QUERY_MARK)),
            self._extend(key, (1 - is_visual) * TEXT_KEY_MARK),
            self._extend(value * is_visual, is_visual),
        )
        output = output.unflatten(-1, (-1, self.head_size))
        return output[..., : self.head_dim].flatten(1), output[:, 0, self.head_dim, None] > 0.5

    def _extend(self, states: torch.Tensor, mark: torch.Tensor) -> torch.Tensor:
        marked = torch.cat((states, mark.expand(-1, states.shape[1], -1)), dim=-1)
        return nn.functional.pad(marked, (0, self.head_size - self.head_dim - 1)).flatten(1)


class PagedCrossAttention(Qwen3VLPVMCrossAttention):
    """The Hub model's cross-attention, with its keys and values in vLLM's cache."""

    def forward(self, query_states, visual_states, metadata, memory):
        """
        As the Hub model's, for all tokens of a step, `[tokens, ...]`. `metadata.mask` says which are visual; `memory`
        is the [`VisualAttention`].
        """
        query = self.q_norm(self.q_proj(query_states).unflatten(-1, (-1, self.head_dim)))
        key = self.k_norm(self.k_proj(visual_states).unflatten(-1, (-1, self.head_dim)))
        value = self.v_proj(visual_states).unflatten(-1, (-1, self.head_dim))
        attn_output, attends = memory(query, key, value, metadata.mask)
        return self.o_proj(attn_output).masked_fill(~attends, 0.0), None


class PVMDecoderLayer(Qwen3DecoderLayer):
    """A stock decoder layer, whose modules it takes over, with a branch beside its FFN."""

    def __init__(
        self,
        layer: Qwen3DecoderLayer,
        config: Qwen3VLPVMTextConfig,
        layer_idx: int,
        visual_tokens: VisualTokens,
        cache_config: CacheConfig,
        prefix: str,
    ):
        nn.Module.__init__(self)  # not Qwen3DecoderLayer's own, which builds these modules
        for name, module in layer.named_children():
            self.add_module(name, module)
        self.visual_tokens = visual_tokens
        self.pvm_block = BLOCKS[config.pvm_block](config, layer_idx)
        sizes = (1, 1, 0)  # a branch that does not read the image needs to know only whether there was one
        if self.pvm_block.reads_image:
            self.pvm_block.cross_attn = PagedCrossAttention(config, layer_idx)
            sizes = (config.pvm_num_attention_heads, config.pvm_num_key_value_heads, config.head_dim)
        backend = layer.self_attn.attn.get_attn_backend()
        self.visual_attention = VisualAttention(*sizes, backend, cache_config, f"{prefix}.visual_attention")

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the stock layer's: the residual stream without the last sum, and its summand, `[tokens, hidden_size]`."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        branch = self.branch(residual)
        return self.mlp(hidden_states) + branch, residual

    def branch(self, residual: torch.Tensor) -> torch.Tensor:
        """From x `[tokens, hidden_size]` to the branch, zero for visual tokens."""
        num_tokens = residual.shape[0]
        step = self.visual_tokens
        is_visual, image_index, embeds = (part[:num_tokens] for part in (step.mask, step.image_index, step.embeds))
        attends = None
        if not self.pvm_block.reads_image:
            nothing = residual.new_empty(num_tokens, 1, 0)
            attends = self.visual_attention(nothing, nothing, nothing, is_visual)[1]
        metadata = CrossAttentionMetadata(attends=attends, mask=is_visual, image_index=image_index)
        return self.pvm_block(residual, embeds, metadata, self.visual_attention).masked_fill(is_visual, 0.0)
