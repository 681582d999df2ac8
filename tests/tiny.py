"""A tiny untrained Qwen3-VL with branches, and inputs for it; nothing is downloaded."""

import contextlib

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from block_qwen3vl_pvm import Qwen3VLPVMBlock
from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration, pvm_blocks


IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END, PAD_TOKEN = 90, 91, 92, 93, 0
FIRST_TEXT_TOKEN, LAST_TEXT_TOKEN, VOCAB_SIZE = 1, 89, 100
PATCH_SIZE, TEMPORAL_PATCH_SIZE, MERGE_SIZE = 4, 2, 2


def stock_config(text: dict | None = None, **fields) -> Qwen3VLConfig:
    """A dense Qwen3-VL of 4 layers; `text` overrides fields of its text config."""
    text_config = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        # Larger than the real 0.02, so that attention is far from uniform and every weight matters.
        "initializer_range": 0.2,
        "pad_token_id": PAD_TOKEN,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
        **(text or {}),
    }
    vision_config = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
        "initializer_range": 0.2,
    }
    return Qwen3VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        **{"tie_word_embeddings": False, **fields},
    )


def pvm_config(text: dict | None = None, *, attn_implementation: str = "sdpa", **pvm_fields) -> Qwen3VLPVMConfig:
    """The same with branches of width 32 (2 heads, 1 key/value head) in layers 1 and 2."""
    config = Qwen3VLPVMConfig.from_stock(
        stock_config(text), **{"pvm_layers": [1, 2], "pvm_hidden_size": 32, **pvm_fields}
    )
    config._attn_implementation = attn_implementation
    return config


def build_stock(text: dict | None = None, seed: int = 0, **fields) -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(seed)
    return Qwen3VLForConditionalGeneration(stock_config(text, **fields)).eval()


def build(config: Qwen3VLPVMConfig | None = None, gate: float = 1.0, seed: int = 0, **pvm_fields):
    """A model with all gates at `gate`, and random biases and norms in its branches, so that each of them matters."""
    torch.manual_seed(seed)
    model = Qwen3VLPVMForConditionalGeneration(config or pvm_config(**pvm_fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".pvm_block." in name and (name.endswith(".bias") or "norm." in name):
                parameter.add_(0.5 * torch.randn_like(parameter))
    set_gates(model, gate)
    return model


def branches(model) -> list[Qwen3VLPVMBlock]:
    return list(pvm_blocks(model).values())


@torch.no_grad()
def set_gates(model, gate: float):
    for block in branches(model):
        block.gate_alpha.fill_(gate)


def text(length: int, seed: int = 0) -> list[int]:
    """`length` random text tokens, the same for the same seed."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(FIRST_TEXT_TOKEN, LAST_TEXT_TOKEN + 1, (length,), generator=generator).tolist()


def image(height: int = 4, width: int = 4, seed: int = 0) -> dict:
    """A random image of height x width patches: a quarter as many visual tokens."""
    return {"token": IMAGE_TOKEN, "grid": (1, height, width), "seed": seed}


def video(frames: int = 2, height: int = 4, width: int = 4, seed: int = 0) -> dict:
    """A random video; in the text, a token for its time stamp precedes each frame."""
    return {"token": VIDEO_TOKEN, "grid": (frames, height, width), "seed": seed}


def inputs(*rows: list, padding_side: str = "left") -> dict[str, torch.Tensor]:
    """What a processor would return for rows made of `text(...)`, `image(...)` and `video(...)` parts."""
    ids, pixels, grids = [], {IMAGE_TOKEN: [], VIDEO_TOKEN: []}, {IMAGE_TOKEN: [], VIDEO_TOKEN: []}
    for row in rows:
        row_ids = []
        for part in row:
            if isinstance(part, list):
                row_ids += part
                continue
            frames, height, width = part["grid"]
            visual_tokens = [part["token"]] * (height * width // MERGE_SIZE**2)
            for frame in range(frames):
                time_stamp = [FIRST_TEXT_TOKEN + frame] if part["token"] == VIDEO_TOKEN else []
                row_ids += [*time_stamp, VISION_START, *visual_tokens, VISION_END]
            generator = torch.Generator().manual_seed(part["seed"])
            patch = (frames * height * width, 3 * TEMPORAL_PATCH_SIZE * PATCH_SIZE**2)
            pixels[part["token"]].append(torch.randn(patch, generator=generator))
            grids[part["token"]].append(part["grid"])
        ids.append(row_ids)

    longest = max(len(row_ids) for row_ids in ids)
    input_ids, attention_mask = [], []
    for row_ids in ids:
        padding = longest - len(row_ids)
        padded, real = row_ids + [PAD_TOKEN] * padding, [1] * len(row_ids) + [0] * padding
        if padding_side == "left":
            padded, real = [PAD_TOKEN] * padding + row_ids, [0] * padding + [1] * len(row_ids)
        input_ids.append(padded)
        attention_mask.append(real)
    batch = {"input_ids": torch.tensor(input_ids), "attention_mask": torch.tensor(attention_mask)}
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN) + 2 * (batch["input_ids"] == VIDEO_TOKEN)
    for token, names in ((IMAGE_TOKEN, ("pixel_values", "image_grid_thw")),
                         (VIDEO_TOKEN, ("pixel_values_videos", "video_grid_thw"))):  # fmt: skip
        if pixels[token]:
            batch[names[0]], batch[names[1]] = torch.cat(pixels[token]), torch.tensor(grids[token])
    return batch


# Every kind of batch: no image, one, several of different sizes, a video, and a mix.
BATCHES = {
    "text only": [[text(9)]],
    "one image": [[text(4), image(), text(7, 1)]],
    "several images": [
        [text(3), image(), text(4, 1), image(4, 8, 1), text(5, 2)],
        [text(5, 3), image(8, 4, 2), text(2)],
    ],
    "video": [[text(3), video(), text(6, 1)]],
    "mixed rows": [
        [text(3), image(), text(4, 1), video(3, 4, 4, 1), text(5, 2)],
        [text(12, 3)],
        [image(4, 8, 2), text(2, 4), image(seed=3), text(3, 5)],
    ],
}


@torch.no_grad()
def logits(model, batch: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    """`[batch, sequence, vocabulary]` of a forward pass, without a cache by default."""
    return model(**batch, **{"use_cache": False, **kwargs}).logits


@contextlib.contextmanager
def decoder_mask(model, allowed: torch.BoolTensor):
    """The decoder's self-attention, and nothing else, uses the mask `[batch, query, key]`."""
    allowed = allowed | torch.eye(allowed.shape[-1], dtype=torch.bool)  # no row is empty
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]
    layers = model.model.language_model.layers
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
