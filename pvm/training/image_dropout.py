"""
Image dropout: in a share of the micro-batches self-attention does not see the image. Visual tokens are not part of the
decoder's sequence, text keeps the rotary positions that it would have, and the branches see the image as always.

While self-attention sees the image, correcting it is the easier way to a low loss, and branches do not learn to carry
the image (docs/study.md). A micro-batch without it costs what its text costs.
"""

from typing import Any

import numpy as np
import torch
from peft import PeftModel

from cache_qwen3vl_pvm import pack
from modeling_qwen3vl_pvm import pvm_blocks
from pvm.data.encoding import IGNORE_INDEX, VISUAL_INPUTS


class ImageDropout:
    """
    Decides which micro-batches train without the image: the same on all ranks, and the same when a run is resumed.

    Args:
        share (`float`): between 0 and 1.
        seed (`int`): of the run.
    """

    def __init__(self, share: float, seed: int):
        self.share, self.seed = share, seed
        self._step, self._micro_batch = -1, 0

    def __call__(self, step: int) -> bool:
        """To be called once for each micro-batch, with the number of optimizer steps so far."""
        self._micro_batch = self._micro_batch + 1 if step == self._step else 0
        self._step = step
        return np.random.default_rng([self.seed, step, self._micro_batch]).random() < self.share


def without_image(model: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """
    A training batch, `labels` included, in which self-attention sees no image.

    Args:
        model: as trained, without the wrappers of distributed training.
        inputs (`dict`): of [`pvm.data.encoding.ConversationCollator`].
    """
    visual = inputs["mm_token_type_ids"] > 0
    if not visual.any():
        return inputs
    if pvm_blocks(model):
        return {**inputs, "image_kv_cache": "skip"}
    # The stock classes can do it, too: without images, and with the positions that their text would have.
    backbone = (model.get_base_model() if isinstance(model, PeftModel) else model).model
    grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    names = ("input_ids", "mm_token_type_ids", "attention_mask")
    position_ids, _ = backbone.get_rope_index(**{name: inputs[name] for name in names}, **grids)
    index, is_text = pack(~visual & inputs["attention_mask"].bool())
    return {
        **{name: value for name, value in inputs.items() if name not in (*VISUAL_INPUTS, "mm_token_type_ids")},
        "input_ids": inputs["input_ids"].gather(1, index),
        "attention_mask": is_text.long(),
        "labels": inputs["labels"].gather(1, index).masked_fill(~is_text, IGNORE_INDEX),
        "position_ids": position_ids.take_along_dim(index[None], dim=2),
    }
