"""
The model `qwen3_vl_pvm` of lmms-eval (an extra): any checkpoint of this project.

lmms-eval's own `qwen3_vl` loads every checkpoint as the stock class, so a PVM checkpoint would answer like its base,
with a warning and no error. This class loads with [`load_checkpoint`]; prompts, images and generation are inherited.
"""

import pvm  # noqa: F401, I001  (first: it makes torchvision importable where its compiled operators are missing)

from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.chat.qwen3_vl import Qwen3_VL
from peft import PeftModel
from transformers import PreTrainedModel

from pvm.checkpoints.loading import load_checkpoint
from pvm.errors import UserError


class Qwen3VLPVM(Qwen3_VL):
    """
    A stock Qwen3-VL, a PVM checkpoint or a PEFT adapter.

    Args:
        pretrained (`str`): folder or Hub name.
        dtype (`str`): "auto" is the checkpoint's own.
        batch_size (`int`): questions that are answered together.
        use_cache, min_pixels, max_pixels, total_pixels, max_num_frames, fps, system_prompt, enable_thinking:
            as in lmms-eval's class, where those for pixels and frames only apply to videos; qwen_vl_utils limits the
            size of images (to 16,384 visual tokens).

    Raises:
        UserError: if there is no such checkpoint, it is incomplete, or there are several processes.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        batch_size: int | str = 1,
        use_cache: bool = True,
        min_pixels: int = 256 * 28 * 28,
        max_pixels: int = 1605632,
        total_pixels: int | None = None,
        max_num_frames: int = 32,
        fps: float | None = None,
        system_prompt: str = "You are a helpful assistant.",
        enable_thinking: bool | None = None,
    ):
        # Instead of the parent's `__init__`, which loads the stock class.
        lmms.__init__(self)
        self.accelerator = Accelerator()
        if self.accelerator.num_processes > 1:
            raise UserError(
                "qwen3_vl_pvm runs in one process, with its model on all visible GPUs. To use GPUs separately, run a "
                "command for each with CUDA_VISIBLE_DEVICES."
            )
        self.load(pretrained, dtype, batch_size)
        self.processor = self.checkpoint.processor
        self._tokenizer = self.processor.tokenizer
        self.batch_size_per_gpu = int(batch_size)
        self.use_cache = use_cache
        self.min_pixels, self.max_pixels, self.total_pixels = min_pixels, max_pixels, total_pixels
        self.max_num_frames, self.fps = max_num_frames, fps
        self.system_prompt = system_prompt
        self.enable_thinking = enable_thinking

    def load(self, pretrained: str, dtype: str, batch_size: int | str) -> None:
        """Set `checkpoint`, and what the parent's `generate_until` needs of it."""
        self.checkpoint = load_checkpoint(pretrained, dtype)
        self._config = self.model.config
        self._device = self.model.device
        self.device_map = str(self.model.device)  # the parent moves inputs there

    def close(self) -> None:
        """Nothing: the memory of a model is that of its object."""

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """
        The model. Not an attribute, because lmms-eval deletes module attributes after each evaluation, and run.py
        evaluates the model several times.
        """
        return self.checkpoint.model
