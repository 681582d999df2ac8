# Copyright 2026 The Qwen3-VL PVM authors. Licensed under the Apache License, Version 2.0.
"""
Qwen3-VL with Persistent Visual Memory (PVM, arXiv 2605.00814): what differs from the stock model.

    x = x + SelfAttention(RMSNorm(x))
    y = x + FFN(RMSNorm(x)) + branch(x; V)          in the layers `config.pvm_layers`, for text after an image

The branch (block_qwen3vl_pvm.py) attends from text tokens to the visual embeddings V as they enter the decoder, before
DeepStack: its softmax runs over the image only, so text cannot dilute it. Keys and values are computed once, when the
visual tokens arrive, and kept in the [`VisualMemory`] that rides with the KV cache (cache_qwen3vl_pvm.py). A later
image is appended there, and later tokens attend to both. No module holds the state of a conversation.
"""

import functools
from collections.abc import Collection
from difflib import get_close_matches

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLPreTrainedModel,
    Qwen3VLTextDecoderLayer,
    Qwen3VLTextModel,
    Qwen3VLVisionModel,
)


try:
    from .adapter_qwen3vl_pvm import AdapterMixin
    from .block_qwen3vl_pvm import CrossAttentionMetadata, Qwen3VLPVMBlock, Qwen3VLPVMCrossAttention, pvm_blocks
    from .cache_qwen3vl_pvm import NO_POSITION, VisualMemory, get_visual_memory, pack, set_visual_memory
    from .configuration_qwen3vl_pvm import Qwen3VLPVMConfig, Qwen3VLPVMTextConfig
    from .eviction_qwen3vl_pvm import CachedTokens, check_image_kv_cache, evict_images, warn_without_image_dropout
    from .generation_qwen3vl_pvm import PVMGenerationMixin
    from .rope_qwen3vl_pvm import CachedRopeMixin, rope_deltas
    from .variants_qwen3vl_pvm import BLOCKS
except ImportError:  # in a checkout, where this file is a top-level module
    from adapter_qwen3vl_pvm import AdapterMixin
    from block_qwen3vl_pvm import CrossAttentionMetadata, Qwen3VLPVMBlock, Qwen3VLPVMCrossAttention, pvm_blocks
    from cache_qwen3vl_pvm import NO_POSITION, VisualMemory, get_visual_memory, pack, set_visual_memory
    from configuration_qwen3vl_pvm import Qwen3VLPVMConfig, Qwen3VLPVMTextConfig
    from eviction_qwen3vl_pvm import CachedTokens, check_image_kv_cache, evict_images, warn_without_image_dropout
    from generation_qwen3vl_pvm import PVMGenerationMixin
    from rope_qwen3vl_pvm import CachedRopeMixin, rope_deltas
    from variants_qwen3vl_pvm import BLOCKS


class Qwen3VLPVMTextDecoderLayer(Qwen3VLTextDecoderLayer):
    """A stock decoder layer with a branch beside its FFN."""

    def __init__(self, config: Qwen3VLPVMTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.pvm_block = BLOCKS[config.pvm_block](config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        visual_embeds: torch.Tensor | None = None,
        visual_memory: VisualMemory | None = None,
        cross_attention_metadata: CrossAttentionMetadata | None = None,
        past_key_values: Cache | None = None,
        use_pvm: bool | Collection[int] = True,
        **kwargs,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` `[batch, sequence, hidden_size]`): x.
            visual_embeds (`torch.Tensor` `[batch, new visual, hidden_size]`, *optional*): V of this pass.
            visual_memory (`VisualMemory`, *optional*): of this pass and those before it.
            cross_attention_metadata (`CrossAttentionMetadata`, *optional*): `None` if there is nothing to attend to.
            use_pvm (`bool` or `Collection[int]`): whether the branch is added, or in which layers it is.
        """
        if cross_attention_metadata is None:
            return super().forward(hidden_states, past_key_values=past_key_values, **kwargs)

        attn_output, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), past_key_values=past_key_values, **kwargs
        )
        hidden_states = hidden_states + attn_output
        memory = None if past_key_values is None else visual_memory  # checkpointing runs this twice, without a cache
        if memory is not None and visual_embeds is not None:
            # Here, because the stock decoder may create the cache, and a cache its first layer when it is used.
            set_visual_memory(past_key_values, memory)

        index = cross_attention_metadata.query_index
        queries = hidden_states if index is None else take(hidden_states, index)
        branch = self.pvm_block(queries, visual_embeds, cross_attention_metadata, memory)

        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        if not (use_pvm if isinstance(use_pvm, bool) else self.pvm_block.layer_idx in use_pvm):
            return hidden_states
        if index is None:
            return hidden_states + branch
        return hidden_states.scatter_add(1, index[..., None].expand_as(branch), branch)


class Qwen3VLPVMPreTrainedModel(AdapterMixin, Qwen3VLPreTrainedModel):
    config: Qwen3VLPVMConfig
    _no_split_modules = [*Qwen3VLPreTrainedModel._no_split_modules, "Qwen3VLPVMTextDecoderLayer"]
    _can_record_outputs = {**Qwen3VLPreTrainedModel._can_record_outputs, "pvm_attentions": Qwen3VLPVMCrossAttention}
    # Keeps the branches out of quantisation, and in float32 in a float16 model.
    _keep_in_fp32_modules = [r".*\.pvm_block"]
    # `AdapterMixin.from_pretrained` says whether branches may be missing.
    _keys_to_ignore_on_load_missing = [r"\.pvm_block\."]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # Only the gate is zero: the model starts as the stock one, and the gate has a gradient from the first step.
        # (Were the output projection zero as well, no parameter of the branch would ever get one.)
        if isinstance(module, Qwen3VLPVMBlock):
            init.zeros_(module.gate_alpha)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=None, **kwargs):
        if enable and gradient_checkpointing_func.keywords.get("use_reentrant"):
            raise ValueError(
                "Reentrant gradient checkpointing does not reach branches in a frozen backbone. Leave `use_reentrant` "
                "out, or set it to False, transformers' default."
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def enable_input_require_grads(self):
        """Does nothing: only reentrant checkpointing needs it, and it would run frozen layers backward for nothing."""


class Qwen3VLPVMTextModel(Qwen3VLPVMPreTrainedModel, Qwen3VLTextModel):
    """The stock decoder with a branch in the layers `config.pvm_layers`."""

    config: Qwen3VLPVMTextConfig

    def __init__(self, config: Qwen3VLPVMTextConfig):
        if config.model_type != Qwen3VLPVMTextConfig.model_type:
            raise ValueError(
                f"The config is a stock model's (`model_type: {config.model_type}`), without PVM fields. Convert it "
                "with `Qwen3VLPVMConfig.from_stock(config, pvm_layers=..., pvm_hidden_size=...)`."
            )
        if config.pvm_block not in BLOCKS:
            raise ValueError(f"`pvm_block={config.pvm_block}` is unknown. Known are {', '.join(BLOCKS)}.")
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
        image_kv_cache: str = "keep",
        **kwargs,
    ) -> tuple | BaseModelOutputWithPast:
        """
        Args:
            inputs_embeds (`torch.Tensor` `[batch, sequence, hidden_size]`): with the visual embeddings in place.
            visual_pos_masks (`torch.BoolTensor` `[batch, sequence]`, *optional*): where they are.
            image_kv_cache (`str`): what self-attention sees of images. "keep": all. "evict": this pass sees them, and
                then their keys and values leave the cache. "skip": visual tokens do not enter the decoder at all, and
                text keeps its rotary positions; hidden states of visual tokens and padding are then zero. Branches
                see and remember all images in any case.
            use_pvm (`bool` or `Collection[int]`, *optional*): `False` turns the branches off in this pass; a list of
                layers keeps those on. What is seen is remembered in any case.
            output_pvm_attentions (`bool`, *optional*): adds `pvm_attentions` to the output, a tuple with the weights
                `[batch, heads, sequence, visual]` of each branch; needs eager attention.
        """
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds, input_ids = self.embed_tokens(input_ids), None
        if not torch.compiler.is_compiling():
            for name in kwargs:
                refuse_misspelt(name)
        wants_attention = kwargs.get("output_pvm_attentions", False)
        if wants_attention and self.config._attn_implementation != "eager":
            raise ValueError(
                f"`output_pvm_attentions=True` needs eager attention, not {self.config._attn_implementation}: call "
                "`model.set_attn_implementation('eager')` first."
            )
        use_pvm, layers = kwargs.get("use_pvm", True), list(self.config.pvm_layers)
        if not isinstance(use_pvm, bool) and not (
            isinstance(use_pvm, list | tuple | set)
            and all(type(layer) is int and layer in layers for layer in use_pvm)
        ):
            raise ValueError(
                f"`use_pvm={use_pvm!r}`: pass True, False or a list of layers with a branch, of {layers}."
            )
        has_images = visual_pos_masks is not None
        skip = has_images and image_kv_cache == "skip"
        if has_images and image_kv_cache != "keep":
            use_cache = kwargs.get("use_cache")
            if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
                past_key_values = DynamicCache(config=self.config)
            if not self.training:
                warn_without_image_dropout(self.config.pvm_training)
        check_image_kv_cache(image_kv_cache, has_images, attention_mask, past_key_values)
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()

        memory = get_visual_memory(past_key_values)
        visual_embeds = metadata = None
        if visual_pos_masks is None and memory is None and self.training and torch.is_grad_enabled():
            # A batch without an image runs one query per row through each branch and zeroes the result, so that every
            # parameter gets a (zero) gradient. Without it, the loss has none and distributed ranks hang.
            visual_pos_masks = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        if visual_pos_masks is not None:
            visual_index, present = pack(visual_pos_masks)
            deltas = rope_deltas(position_ids, attention_mask, past_length, inputs_embeds)
            memory = VisualMemory.extended(
                memory,
                positions=(visual_index + past_length).masked_fill(~present, NO_POSITION).int(),
                rope_deltas=deltas.expand_as(visual_pos_masks).gather(1, visual_index).int(),
                in_kv_cache=not skip,
            )
            visual_embeds = take(inputs_embeds, visual_index)
            is_text = ~visual_pos_masks
            text_index = torch.arange(is_text.shape[1], device=is_text.device)[None]
            if skip:
                if attention_mask is not None:
                    is_text = is_text & attention_mask[:, past_length:].bool()
                text_index, is_text = pack(is_text)
            metadata = self._metadata(
                is_text, text_index + past_length, memory, visual_index.shape[1], pack_queries=not wants_attention
            )
        elif memory is not None:  # all of which lies before this pass
            attends = mask = None
            if not memory.complete:
                present = memory.positions.to(inputs_embeds.device) != NO_POSITION
                attends = present.any(dim=1)[:, None, None]
                mask = (present[:, None] | ~attends)[:, None]
            metadata = CrossAttentionMetadata(attends=attends, mask=mask)

        kwargs |= {"visual_embeds": visual_embeds, "visual_memory": memory, "cross_attention_metadata": metadata}
        if skip:
            return self._forward_text(
                text_index, is_text, attention_mask, position_ids, inputs_embeds, past_key_values, **kwargs
            )
        cached = CachedTokens.of(past_key_values)
        length = past_length + inputs_embeds.shape[1]
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask if cached is None else cached.mask(attention_mask, length),
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            visual_pos_masks=visual_pos_masks,
            **kwargs,
        )
        if image_kv_cache == "evict" and past_key_values is not None:
            evict_images(past_key_values, attention_mask)
        return output

    def _forward_text(
        self, index, is_text, attention_mask, position_ids, inputs_embeds, past_key_values, **kwargs
    ) -> BaseModelOutputWithPast:
        """The decoder on the tokens `index` `[batch, text]` alone; their states where they were in `inputs_embeds`."""
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        cached = CachedTokens.of(past_key_values) or CachedTokens.all(past_length, len(index), index.device)
        mask = torch.cat([cached.mask(attention_mask, past_length), is_text], dim=1)
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=index.device) + past_length
        output = super().forward(
            attention_mask=mask.long(),
            position_ids=position_ids[-3:].expand(3, len(index), -1).take_along_dim(index[None], dim=2),
            inputs_embeds=take(inputs_embeds, index),
            past_key_values=past_key_values,
            **{**kwargs, "deepstack_visual_embeds": None},
        )
        if past_key_values is not None:
            positions = (index + past_length).masked_fill(~is_text, NO_POSITION)
            positions = torch.cat([cached.until(past_length), positions], dim=1)
            CachedTokens(positions, past_length + inputs_embeds.shape[1]).set(past_key_values)
        states = output.last_hidden_state * is_text[..., None]
        index = index[..., None].expand_as(states)
        output.last_hidden_state = torch.zeros_like(inputs_embeds).scatter_add(1, index, states)
        return output

    def _metadata(self, is_text, positions, memory, new_visual: int, pack_queries: bool) -> CrossAttentionMetadata:
        """
        Who attends to whom in a pass with `new_visual` visual tokens, of whose tokens `[batch, sequence]` some are
        text. If `pack_queries`, only the text tokens that attend to something go through the branches.
        """
        # A visual token is visible to later positions; without `pvm_causal` to all. (NO_POSITION is larger than any.)
        visible_after = memory.positions
        if not self.config.pvm_causal:
            visible_after = visible_after.masked_fill(visible_after != NO_POSITION, -1)
        first, last = visible_after.aminmax(dim=1, keepdim=True)  # [batch, 1]
        attends = is_text & (positions > first)

        query_index, query_positions = None, positions.expand_as(attends)
        if pack_queries:
            query_index, attends = pack(attends)
            query_positions = query_positions.gather(1, query_index)
        mask = None
        if (last >= query_positions.masked_fill(~attends, NO_POSITION).amin(dim=1, keepdim=True)).any():
            mask = visible_after[:, None] < query_positions[..., None]
            # What attends to nothing is zeroed after the attention, whose softmax must not run over an empty row.
            mask = (mask | ~attends[..., None])[:, None]
        image_index = memory.image_index[:, -new_visual:]
        return CrossAttentionMetadata(query_index, attends[..., None], mask, image_index)


def take(states: torch.Tensor, index: torch.LongTensor) -> torch.Tensor:
    """`states` `[batch, sequence, hidden_size]` at `index` `[batch, n]`. (take_along_dim would copy the index.)"""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


ARGUMENTS = ("use_pvm", "image_kv_cache", "output_pvm_attentions")  # that stock methods do not have


@functools.cache
def refuse_misspelt(name: str) -> None:
    """Raise a `TypeError` for a name that is nearly one of [`ARGUMENTS`]: stock methods would ignore it."""
    is_known = name in (*ARGUMENTS, "output_attentions")
    if not is_known and ("pvm" in name.lower() or get_close_matches(name, ARGUMENTS, cutoff=0.7)):
        raise TypeError(f"`{name}` is not an argument of the model. Did you mean one of {', '.join(ARGUMENTS)}?")


class Qwen3VLPVMModel(CachedRopeMixin, Qwen3VLPVMPreTrainedModel, Qwen3VLModel):
    """The stock vision tower and the decoder with branches."""

    # Every save writes the code files beside the weights.
    _auto_class = "AutoModel"

    def __init__(self, config: Qwen3VLPVMConfig):
        super(Qwen3VLModel, self).__init__(config)  # not Qwen3VLModel's own, which builds the stock decoder
        self.visual = Qwen3VLVisionModel._from_config(config.vision_config)
        self.language_model = Qwen3VLPVMTextModel._from_config(config.text_config)
        self.rope_deltas = None  # an attribute that transformers reads; the offsets themselves are in the cache
        self.post_init()

    @functools.wraps(Qwen3VLModel.forward)  # the Trainer reads the signature
    def forward(self, *args, **kwargs) -> tuple | BaseModelOutputWithPast:
        given = {name for name, value in kwargs.items() if value is not None}
        input_ids = args[0] if args else kwargs.get("input_ids")
        # An empty dict of encoder outputs means no images: generate() of transformers 5.23 passes it.
        has_images = given & {"pixel_values", "pixel_values_videos"} or kwargs.get("mm_encoder_outputs")
        if not has_images and ("inputs_embeds" in given or "position_ids" not in given):
            has_grids = given & {"image_grid_thw", "video_grid_thw"}
            types = kwargs.get("mm_token_type_ids") if "inputs_embeds" in given else None
            if has_grids and get_visual_memory(kwargs.get("past_key_values")) is not None:  # of all images so far?
                kwargs["mm_token_type_ids"] = self.token_types(input_ids, kwargs.get("inputs_embeds"))
                has_grids = kwargs["mm_token_type_ids"].any()
            if has_grids or (types is not None and types.any()):
                raise ValueError(
                    "Positions or grids of images came without `pixel_values`, so the branches cannot know where "
                    "images are. Pass `pixel_values` and placeholders, or neither; for `inputs_embeds` with images "
                    "already merged in, call the decoder: `model.model.language_model(inputs_embeds=..., "
                    "visual_pos_masks=..., position_ids=..., deepstack_visual_embeds=...)`."
                )
        if has_images and "position_ids" not in given:
            # Found now, because merging images into embeddings hides the placeholders.
            kwargs["mm_token_type_ids"] = self.token_types(input_ids, kwargs.get("inputs_embeds"))
            self.check_grids(kwargs["mm_token_type_ids"], kwargs.get("image_grid_thw"), kwargs.get("video_grid_thw"))
        return super().forward(*args, **kwargs)


class Qwen3VLPVMForConditionalGeneration(
    PVMGenerationMixin, Qwen3VLPVMPreTrainedModel, Qwen3VLForConditionalGeneration, GenerationMixin
):
    """Qwen3-VL with Persistent Visual Memory and its language modelling head."""

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
                "The stock model's output has no field for the branches' attention. Call the backbone: "
                "`model.model(..., output_pvm_attentions=True).pvm_attentions` (needs transformers newer than 5.16)."
            )
        return super().forward(*args, **kwargs)


__all__ = [
    "Qwen3VLPVMForConditionalGeneration",
    "Qwen3VLPVMModel",
    "Qwen3VLPVMPreTrainedModel",
    "Qwen3VLPVMTextModel",
    "pvm_blocks",
]
