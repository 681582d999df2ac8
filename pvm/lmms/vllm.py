"""[`Qwen3VLPVM`] in vLLM: the same prompts and images, many of them at once."""

from collections.abc import Iterator
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.protocol import ChatMessages
from qwen_vl_utils import process_vision_info
from vllm import SamplingParams

from pvm.errors import UserError
from pvm.lmms.model import Qwen3VLPVM
from pvm.vllm.engine import Engine, Request


class Qwen3VLPVMInVLLM(Qwen3VLPVM):
    """
    As its parent. `batch_size` is the most questions that are answered together.

    Raises:
        UserError: for videos and beam search.
    """

    def load(self, pretrained: str, dtype: str, batch_size: int | str) -> None:
        self.checkpoint = Engine(pretrained, dtype, int(batch_size))

    def close(self) -> None:
        """Stop vLLM."""
        self.checkpoint.close()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        results: dict[int, GenerationResult] = {}
        for index, output in self.checkpoint.generate(self._requests(requests)):
            tokens = output.outputs[0].token_ids
            answer = self._strip_thinking(self.processor.decode(tokens, skip_special_tokens=True))
            results[index] = GenerationResult(text=answer, token_counts=TokenCounts(output_tokens=len(tokens)))
        return [results[index] for index in range(len(requests))]

    def _requests(self, requests: list[Instance]) -> Iterator[Request]:
        for index, request in enumerate(requests):
            _, doc_to_messages, gen_kwargs, doc_id, task, split = request.args
            system = {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}
            messages = [system, *doc_to_messages(self.task_dict[task][split][doc_id])]
            messages = ChatMessages(messages=messages).to_hf_messages(video_kwargs=self._build_video_kwargs())
            (text,) = self._apply_chat_template([messages])
            images, videos = process_vision_info([messages], image_patch_size=16)
            if videos:
                raise UserError(f"--tasks {task}: with --backend vllm only images are supported, and it has videos.")
            prompt: dict[str, Any] = {"prompt": text}
            if images:
                prompt |= {"multi_modal_data": {"image": images}, "mm_processor_kwargs": {"do_resize": False}}
            yield prompt, self._sampling(gen_kwargs, gen_kwargs["seed"] * len(requests) + index)

    def _sampling(self, gen_kwargs: dict[str, Any], seed: int) -> SamplingParams:
        """What `generate` of transformers is asked for by the parent."""
        values = self._build_generate_kwargs(gen_kwargs)
        if values.get("num_beams", 1) > 1:
            raise UserError("--backend vllm has no beam search, which a task asks for: use --backend transformers.")
        sampled = {name: values[name] for name in ("temperature", "top_p", "top_k") if name in values}
        return SamplingParams(
            **(sampled if values["do_sample"] else {"temperature": 0}),
            seed=seed,
            max_tokens=values["max_new_tokens"],
            ignore_eos=True,
            stop_token_ids=[values["eos_token_id"]],
            detokenize=False,
        )
