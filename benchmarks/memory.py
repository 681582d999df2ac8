"""
Bytes in the cache of a conversation, with branches and without.

    python -m benchmarks.memory

After a prefill of the same size, all tensors of the cache are counted, each storage once.
"""

import torch
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from benchmarks.common import build, parser, print_environment, print_table
from cache_qwen3vl_pvm import VisualMemory
from modeling_qwen3vl_pvm import pvm_blocks


TEXT_TOKENS = 64


def tensors(holder: CacheLayerMixin | VisualMemory) -> list[torch.Tensor]:
    """All tensors of a cache layer, those of the visual memory included."""
    found = []
    for value in vars(holder).values():
        if isinstance(value, VisualMemory):
            found += tensors(value)
        found += value.values() if isinstance(value, dict) else [value]
    return [value for value in found if isinstance(value, torch.Tensor)]


@torch.no_grad()
def cache_bytes(model: torch.nn.Module, visual_tokens: int) -> int:
    decoder, length = model.model.language_model, visual_tokens + TEXT_TOKENS
    cache = DynamicCache(config=decoder.config)
    decoder(
        inputs_embeds=torch.randn(1, length, decoder.config.hidden_size, dtype=model.dtype, device=model.device),
        visual_pos_masks=(torch.arange(length, device=model.device) < visual_tokens)[None],
        past_key_values=cache,
    )
    storages = [tensor.untyped_storage() for layer in cache.layers for tensor in tensors(layer)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def main() -> None:
    command_line = parser(__doc__)
    command_line.add_argument("--visual_tokens", type=int, nargs="+", default=[256, 1024])
    args = command_line.parse_args()
    stock, branched = build(args)
    print_environment(args, branched)
    config = branched.config.text_config
    keys_and_values = (
        2 * config.pvm_num_key_value_heads * config.head_dim * len(pvm_blocks(branched)) * branched.dtype.itemsize
    )
    print(
        f"expected per visual token: 2 x {config.pvm_num_key_value_heads} key/value head(s) x {config.head_dim} x "
        f"{len(pvm_blocks(branched))} branches x {branched.dtype.itemsize} bytes = {keys_and_values}, and 8 for the "
        "index that the branches share (position and rotary offset)\n"
    )
    rows = []
    for visual_tokens in args.visual_tokens:
        without, with_branches = (cache_bytes(model, visual_tokens) for model in (stock, branched))
        extra = with_branches - without
        rows.append(
            [
                f"{visual_tokens:,}",
                f"{without:,}",
                f"{extra:,}",
                f"{extra / visual_tokens:g}",
                f"{extra / without:.2%}",
            ]
        )
    print_table("The cache", ["visual tokens", "stock, bytes", "PVM adds", "per visual token", "of the cache"], rows)


if __name__ == "__main__":
    main()
