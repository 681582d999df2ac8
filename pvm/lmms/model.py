"""
This project's checkpoints as a model of lmms-eval, `qwen3_vl_pvm`. It needs lmms-eval, an extra.

lmms-eval's own `qwen3_vl` builds the stock class from whatever it is given: a PVM checkpoint then answers as its base,
with a warning and no error. Here prompts, images and generation are that class's, and only the loading is not.
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
    A stock Qwen3-VL, a PVM checkpoint, its control or a PEFT adapter, loaded by [`load_checkpoint`].

    Args:
        pretrained (`str`): folder or Hub name.
        dtype (`str`): "auto" is the checkpoint's.
        batch_size (`int`): questions that are answered at once.
        use_cache, min_pixels, max_pixels, total_pixels, max_num_frames, fps, system_prompt, enable_thinking:
            as in lmms-eval's class. The ones for pixels and frames are for videos there; the size of images is
            qwen_vl_utils' (at most 16,384 visual tokens).

    Raises:
        UserError: if there is no such checkpoint, or it would be evaluated as another model than it says, or there are
            several processes.
        TypeError: if the class of the loaded model is not that of its kind.
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
        # Not the parent's: it does no more than this one, but loads the stock class.
        lmms.__init__(self)
        self.accelerator = Accelerator()
        if self.accelerator.num_processes > 1:
            raise UserError(
                "qwen3_vl_pvm runs in one process, whose model is spread over all GPUs that it sees. To use several "
                "GPUs apart, give each a command of its own with CUDA_VISIBLE_DEVICES."
            )
        self.checkpoint = load_checkpoint(pretrained, dtype)
        self.processor = self.checkpoint.processor
        self._tokenizer = self.processor.tokenizer
        self._config = self.model.config
        self._device = self.model.device
        self.device_map = str(self.model.device)  # where the parent's generation puts its inputs
        self.batch_size_per_gpu = int(batch_size)
        self.use_cache = use_cache
        self.min_pixels, self.max_pixels, self.total_pixels = min_pixels, max_pixels, total_pixels
        self.max_num_frames, self.fps = max_num_frames, fps
        self.system_prompt = system_prompt
        self.enable_thinking = enable_thinking

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """
        What generates. It is no attribute, because lmms-eval deletes those that are modules after each evaluation, and
        benchmarks.py evaluates one model several times.
        """
        return self.checkpoint.model
