"""What is not served, said before the engine starts."""

from typing import TYPE_CHECKING

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from adapter_qwen3vl_pvm import check_base
from configuration_qwen3vl_pvm import REFERENCE_ARCHITECTURE


if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ServedCheckpoint(VerifyAndUpdateConfig):
    """vLLM's hook for a model's own checks."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """
        Raises:
            OSError: if the base of an adapter checkpoint is not found.
            ValueError: if the base is another model, or the checkpoint or an option of vLLM is not supported.
        """
        # Slow to import, and this module is imported in all processes of vLLM, whatever it serves.
        from vllm.model_executor.model_loader import get_model_loader
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
        from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

        model_config = vllm_config.model_config
        name, config = model_config.model, model_config.hf_config
        if REFERENCE_ARCHITECTURE in config.architectures or not config.text_config.pvm_causal:
            raise ValueError(
                f"In {name}, text attends to images that come after it, too (`pvm_causal` is off, as in the authors' "
                "implementation), so keys and values cannot be computed once and cached as vLLM does. Its weights "
                f"may be served with `pvm_causal` on, which changes answers if text precedes an image: `python -m "
                f"pvm convert {name} FOLDER --to whole`, then set `pvm_causal` to true in FOLDER/config.json."
            )
        if config.peft_adapter is not None and vllm_config.lora_config is None:
            raise ValueError(
                f"{name} has a LoRA adapter in {config.peft_adapter}/ that was trained with its branches, and would "
                f"be served without it. Add `--enable-lora --lora-modules NAME={name}/{config.peft_adapter}` and ask "
                f"for the model NAME, or merge it: `python -m pvm convert {name} FOLDER --to whole`."
            )
        parallel = vllm_config.parallel_config
        sizes = ("pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size")
        for size in sizes:
            if getattr(parallel, size) > 1:
                raise ValueError(
                    f"`--{size.replace('_', '-')}` is not supported: not all ranks would know the visual tokens. Use "
                    "`--tensor-parallel-size`."
                )
        if parallel.use_ubatching:
            raise ValueError(
                "Micro-batch overlap (`--enable-dbo`, `--ubatch-size`) is not supported: the branches take the "
                "visual tokens of a step from one buffer. Leave it out."
            )
        if model_config.multimodal_config.is_multimodal_pruning_enabled():
            raise ValueError(
                "Pruning of video tokens is not supported: the branches would take time stamps for visual tokens. "
                "Leave `--video-pruning-rate` out."
            )
        if config.base_model_name_or_path is not None:
            loader = get_model_loader(vllm_config.load_config)
            if not isinstance(loader, DefaultModelLoader | DummyModelLoader):
                raise ValueError(
                    f"{name} holds PVM branches only, and `--load-format {vllm_config.load_config.load_format}` would "
                    "not load their base. Leave it out, or serve a whole checkpoint: `python -m pvm convert "
                    f"{name} FOLDER --to whole`."
                )
            base = config.base_model_name_or_path
            try:
                base_config = type(config).from_pretrained(base, revision=config.base_model_revision or "main")
            except OSError as error:
                raise OSError(
                    f"{name} holds PVM branches only, and their base, {base}, could not be loaded: "
                    f"{str(error).partition(chr(10))[0]} If it is somewhere else, add `--hf-overrides "
                    """'{"base_model_name_or_path": "PLACE"}'`."""
                ) from error
            check_base(base_config, config, name)
