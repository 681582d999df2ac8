"""vLLM's Qwen3-VL with branches. What differs from the stock class; see branch.py."""

from collections.abc import Iterable, Iterator

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.utils import maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from adapter_qwen3vl_pvm import ADAPTER_WEIGHTS_NAME, check_weights
from pvm.vllm.branch import PVMDecoderLayer, VisualTokens
from pvm.vllm.processor import Qwen3VLPVMMultiModalProcessor


logger = init_logger(__name__)

# Of a rotary position. The rest of an int32 are for the number of an image, which branches take modulo 64.
POSITION_BITS, MAX_IMAGES = 24, 64


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLPVMMultiModalProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class Qwen3VLPVMForConditionalGeneration(Qwen3VLForConditionalGeneration):
    """
    Serves whole and adapter checkpoints.

    Raises:
        ValueError: if weights of branches are missing, a gate is corrupted, or all are zero although the branches were
            trained.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model"):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = self.config.text_config
        self.visual_tokens = VisualTokens(vllm_config.scheduler_config.max_num_batched_tokens, config.hidden_size)
        layers = self.language_model.model.layers
        for layer_idx in config.pvm_layers:
            layers[layer_idx] = PVMDecoderLayer(
                layers[layer_idx],
                config,
                layer_idx,
                self.visual_tokens,
                vllm_config.cache_config,
                maybe_prefix(prefix, f"language_model.model.layers.{layer_idx}"),
            )
        self.branches_loaded = False
        branches = [layers[layer_idx].visual_attention.attn for layer_idx in config.pvm_layers]
        backbone, added = (
            sum(attention.num_kv_heads * attention.head_size for attention in attentions)
            for attentions in ([layer.self_attn.attn for layer in layers], branches)
        )
        logger.info_once(
            "PVM branches in layers %s, of head size %d: %.1f %% more KV cache per token.",
            *(str(config.pvm_layers), branches[0].head_size, 100 * added / backbone),
        )
        if self.config.base_model_name_or_path is not None:
            # vLLM's loader reads both.
            self.allow_patterns_overrides = [ADAPTER_WEIGHTS_NAME]
            self.secondary_weights = [
                DefaultModelLoader.Source(self.config.base_model_name_or_path, self.config.base_model_revision)
            ]

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None) -> torch.Tensor:
        """As the stock model's, which vLLM calls at each step; keeps where visual tokens are."""
        mask = self.visual_tokens.mask.zero_()
        if multimodal_embeddings is not None and len(multimodal_embeddings) > 0:
            mask[: len(is_multimodal), 0].copy_(is_multimodal, non_blocking=True)
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def get_mrope_input_positions(self, input_tokens, mm_features) -> tuple[torch.Tensor, int]:
        """
        As the stock model's, with the number of the image or video frame in the upper bits of the first row: vLLM
        passes nothing else to `forward` that knows a whole prompt, in whatever chunks it is computed.
        """
        positions, delta = super().get_mrope_input_positions(input_tokens, mm_features)
        tokens = torch.tensor(input_tokens)
        is_visual = (tokens == self.config.image_token_id) | (tokens == self.config.video_token_id)
        is_first = is_visual & ~torch.nn.functional.pad(is_visual[:-1], (1, 0))
        image_index = (is_first.cumsum(dim=0) - 1) % MAX_IMAGES
        positions[0] += image_index.masked_fill(~is_visual, 0) << POSITION_BITS
        return positions, delta

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs) -> torch.Tensor:
        """As the stock model's; keeps what enters the decoder."""
        if inputs_embeds is not None:  # else the engine serves text only
            self.visual_tokens.embeds[: len(inputs_embeds)].copy_(inputs_embeds)
        self.visual_tokens.image_index[: positions.shape[1]].copy_(positions[0] >> POSITION_BITS)
        positions.bitwise_and_(2**POSITION_BITS - 1)  # in place: CUDA graphs read them where vLLM wrote them
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load all weights, or those to be updated, named as in a checkpoint. Returns the names of vLLM."""
        branches = {name: weight for name, weight in self.named_parameters() if ".pvm_block." in name}
        loaded = set()

        def load_branches() -> Iterator[tuple[str, torch.Tensor]]:
            # Not by the stock class, which would pack q_proj, k_proj and v_proj of a branch, too.
            for name, weight in weights:
                if ".pvm_block." not in name:
                    yield name, weight
                    continue
                name = f"language_model.model.{name[name.index('layers.') :]}"
                if name not in loaded:  # the adapter's come first, and a base may have branches, too
                    default_weight_loader(branches[name], weight)
                    loaded.add(name)

        backbone = super().load_weights(load_branches())
        # Later calls may update single weights.
        if not self.branches_loaded or len(loaded) == len(branches):
            check_weights(self, self.model_config.model, set(), loaded)
            self.branches_loaded = True
        return backbone | loaded
