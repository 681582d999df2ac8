"""A checkpoint of any kind in vLLM, where `pvm eval --backend vllm` has its questions answered."""

from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points
from math import prod
from pathlib import Path
from typing import Any, get_args

import torch
import vllm
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_WEIGHTS_NAME
from pydantic import ValidationError
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, ProcessorMixin
from transformers.utils import cached_file
from vllm.config.lora import MaxLoRARanks
from vllm.lora.request import LoRARequest
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.sampling_params import RequestOutputKind

from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration
from pvm.checkpoints.loading import Description, processor_of, trainer_step
from pvm.checkpoints.names import base_of, branch_block, checkpoint_kind, commit_of, pvm_config
from pvm.data.forms import Conversation
from pvm.data.media import read_image, read_video
from pvm.errors import UserError, reason
from pvm.vllm.worker import ModelReader


Request = tuple[dict[str, Any], vllm.SamplingParams]


class Engine:
    """
    vLLM with a stock Qwen3-VL, a PVM checkpoint or a PEFT adapter, on all visible GPUs.

    Args:
        path (`str`): folder or Hub name.
        dtype (`str`): "auto" is the checkpoint's own, also where vLLM's own "auto" would be smaller.
        batch_size (`int`, *optional*): most requests that are answered together; vLLM decides by default.
        max_length (`int`): most tokens of a prompt with its answer; -1 is what the memory allows.

    Attributes:
        processor (`ProcessorMixin`), description (`Description`): as those of a [`Checkpoint`].
        ends (`list[int]`): tokens that end an answer.

    Raises:
        UserError: if there is no such checkpoint, or vLLM refuses it.
    """

    def __init__(self, path: str, dtype: str = "auto", batch_size: int | None = None, max_length: int = -1):
        kind, self.processor = checkpoint_kind(path), processor_of(path)
        name, revision = base_of(path) if kind == "peft" else (path, "main")
        is_pvm = checkpoint_kind(name, revision) == "pvm"
        if is_pvm and not entry_points(group="vllm.general_plugins", name="qwen3_vl_pvm"):
            raise UserError(f"vLLM does not know the class of {name}: install this project beside it, pip install .")
        config = pvm_config(name, revision) if is_pvm else AutoConfig.from_pretrained(name, revision=revision)
        adapters = [(path, None)] if kind == "peft" else []
        adapters += [(name, config.peft_adapter)] if is_pvm and config.peft_adapter is not None else []
        if len(adapters) > 1:
            raise UserError(
                f"{path} is a PEFT adapter on {name}, which has one, too, and vLLM takes one at a time. Merge the "
                f"base's: `python -m pvm convert {name} FOLDER --to whole`."
            )
        self.lora, lora_options, lora_parameters = None, {}, 0
        for adapter in adapters:
            self.lora, lora_options, lora_parameters = find_lora(*adapter)
        if dtype == "auto":
            dtype = config.dtype or config.text_config.dtype or "auto"
        try:
            self.llm = vllm.LLM(
                name,
                revision=revision,
                dtype=dtype,
                max_model_len=max_length,
                max_num_seqs=batch_size,
                tensor_parallel_size=max(1, torch.cuda.device_count()),
                worker_extension_cls=f"{ModelReader.__module__}.{ModelReader.__qualname__}",
                **lora_options,
            )
            if self.lora is not None:
                self.llm.llm_engine.add_lora(self.lora)
        except ValidationError as error:  # of vLLM's configs, with the sentence inside
            raise UserError(
                f"vLLM cannot serve {path}: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
            ) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"vLLM cannot serve {path}: {reason(error)}") from error

        ends = self.llm.llm_engine.model_config.try_get_generation_config().get("eos_token_id")
        ends = self.processor.tokenizer.eos_token_id if ends is None else ends
        self.ends: list[int] = ends if isinstance(ends, list) else [ends]
        with torch.device("meta"):
            model = (
                Qwen3VLPVMForConditionalGeneration(config)
                if is_pvm
                else AutoModelForImageTextToText.from_config(config)
            )
        training = (config.text_config.pvm_training or {}) if is_pvm else {}
        step = None if kind == "peft" else training.get("step")
        self.description = Description(
            path=path,
            commit=commit_of(path),
            kind=kind,
            block=branch_block(name, revision),
            base=name if kind == "peft" else config.base_model_name_or_path if is_pvm else None,
            method="lora" if kind == "peft" else training.get("method"),
            step=trainer_step(path) if step is None else step,
            dtype=str(self.llm.llm_engine.model_config.dtype).removeprefix("torch."),
            parameters=model.num_parameters() + lora_parameters,
            **self.llm.collective_rpc("describe_model")[0],
        )

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[int, vllm.RequestOutput]]:
        """
        Answers in the order in which they are finished, each with the index of its request. Requests are taken when
        there is room for them.

        Args:
            requests: prompts as `LLM.generate` takes them, and how each is answered.

        Raises:
            UserError: if an answer does not fit behind its prompt.
        """
        engine = self.llm.llm_engine
        waiting = enumerate(requests)
        most = 2 * engine.vllm_config.scheduler_config.max_num_seqs  # so that there is always one to start
        limits: dict[int, int] = {}
        while True:
            while engine.get_num_unfinished_requests() < most and (request := next(waiting, None)) is not None:
                index, (prompt, sampling) = request
                limits[index], sampling.output_kind = sampling.max_tokens, RequestOutputKind.FINAL_ONLY
                (rendered,) = engine.renderer.render_cmpl([parse_model_prompt(engine.model_config, prompt)])
                engine.add_request(str(index), rendered, sampling, lora_request=self.lora)
            if not engine.has_unfinished_requests():
                return
            for output in engine.step():
                index = int(output.request_id)
                (answer,) = output.outputs
                if answer.finish_reason == "length" and len(answer.token_ids) < limits[index]:
                    raise UserError(
                        f"Behind a prompt of {len(output.prompt_token_ids)} tokens there is no room for an answer of "
                        f"{limits[index]} in vLLM's context of {engine.model_config.max_model_len}."
                    )
                yield index, output

    def greedy(self, limit: int) -> vllm.SamplingParams:
        """How an answer of at most `limit` tokens is given by [`load_checkpoint`]'s models."""
        return vllm.SamplingParams(
            temperature=0,
            max_tokens=limit,
            ignore_eos=True,  # of the tokenizer
            stop_token_ids=self.ends,
            detokenize=False,
        )

    def close(self) -> None:
        """Stop vLLM, whose memory the next model needs."""
        self.llm.llm_engine.engine_core.shutdown()


def find_lora(name: str, subfolder: str | None) -> tuple[LoRARequest, dict[str, Any], int]:
    """
    The LoRA adapter in a folder or under a Hub name as vLLM takes it, the options that it needs, and how many
    parameters it has.

    Raises:
        UserError: for a PEFT adapter of another kind.
    """
    places = {"path_or_repo_id": name, "subfolder": subfolder or ""}
    config = PeftConfig.from_pretrained(Path(cached_file(filename=PEFT_CONFIG_NAME, **places)).parent)
    if not isinstance(config, LoraConfig):
        raise UserError(f"{name} is a PEFT adapter of the type {config.peft_type.value}, and vLLM serves LoRA only.")
    weights = cached_file(filename=PEFT_WEIGHTS_NAME, **places)
    with safe_open(weights, "pt") as file:
        parameters = sum(prod(file.get_slice(key).get_shape()) for key in file.keys())
    rank = max([config.r, *config.rank_pattern.values()])
    options = {"enable_lora": True, "max_lora_rank": min(size for size in get_args(MaxLoRARanks) if size >= rank)}
    return LoRARequest("adapter", 1, str(Path(weights).parent)), options, parameters


def as_prompt(conversation: Conversation, processor: ProcessorMixin) -> dict[str, Any]:
    """All messages of a conversation but its last one, as `LLM.generate` takes them."""
    text = processor.apply_chat_template(conversation.messages[:-1], tokenize=False, add_generation_prompt=True)
    media: dict[str, Any] = {}
    if conversation.images:
        media["image"] = [read_image(image) for image in conversation.images]
    if conversation.videos:
        videos = [read_video(video, processor.video_processor) for video in conversation.videos]
        media["video"] = [
            (frames.permute(0, 2, 3, 1).numpy(), {**metadata, "do_sample_frames": False})
            for frames, metadata in videos
        ]
    return {"prompt": text, "multi_modal_data": media} if media else {"prompt": text}
