# Copyright 2026 The Qwen3-VL PVM authors. Licensed under the Apache License, Version 2.0.
"""What `generate()` needs to know about branches, their memory, and images that leave the KV cache."""

from collections.abc import Collection

from transformers.generation import GenerationMixin, LogitsProcessorList, SuppressTokensLogitsProcessor


try:
    from .eviction_qwen3vl_pvm import evict_images
except ImportError:  # in a checkout, where this file is a top-level module
    from eviction_qwen3vl_pvm import evict_images


class PVMGenerationMixin:
    """`generate()` of `Qwen3VLPVMForConditionalGeneration`."""

    def prepare_inputs_for_generation(
        self,
        input_ids,
        *,
        inputs_embeds=None,
        use_pvm: bool | Collection[int] = True,
        image_kv_cache: str = "keep",
        **kwargs,
    ):
        """As the stock model; `generate()` accepts only arguments that are named here."""
        kwargs |= {"inputs_embeds": inputs_embeds, "use_pvm": use_pvm, "image_kv_cache": image_kv_cache}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """Overrides the stock method: token counts and rotary positions, `[4, batch, past + new]`."""
        # Not the stock Qwen3-VL method, whose positions come from its module.
        counts = GenerationMixin._prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs)
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
        named = ("image_grid_thw", "video_grid_thw", "attention_mask", "past_key_values")
        new_positions = self.model.compute_3d_position_ids(
            input_ids,
            inputs_embeds,
            **{name: model_kwargs.get(name) for name in named},
            mm_token_type_ids=self.model.token_types(input_ids, inputs_embeds),
        )
        position_ids = counts.expand(4, inputs_tensor.shape[0], -1).clone()
        if new_positions is not None:
            position_ids[1:, :, past_length:] = new_positions
        return position_ids

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        if generation_config.prefill_chunk_size is None or model_kwargs.get("image_kv_cache") != "evict":
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        # Later chunks of the prompt see images of earlier ones.
        attention_mask = model_kwargs["attention_mask"]
        model_kwargs = {**model_kwargs, "image_kv_cache": "keep"}
        output = super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        evict_images(output.past_key_values, attention_mask)
        return output

    def _get_candidate_generator(self, *args, logits_processor, **kwargs):
        # Prompts hold placeholders of images. What prompt lookup takes from them must not.
        placeholders = [self.config.image_token_id, self.config.video_token_id]
        suppress = SuppressTokensLogitsProcessor(placeholders, device=self.device)
        kwargs["logits_processor"] = LogitsProcessorList([*logits_processor, suppress])
        return super()._get_candidate_generator(*args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused, and with it `generate_batch`, which calls this."""
        raise ValueError(
            "Continuous batching of transformers has no way to pass images to the model, and no place for what "
            "branches remember. Call `generate`, or serve with vLLM."
        )
