"""The entry point in pyproject.toml: tells vLLM which class serves a PVM checkpoint."""

ARCHITECTURE = "Qwen3VLPVMForConditionalGeneration"


def register() -> None:
    """Called by vLLM at the start of each of its processes, and possibly twice in one."""
    # Not imported before vLLM runs: its registry inspects plugins.
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from configuration_qwen3vl_pvm import REFERENCE_ARCHITECTURE, Qwen3VLPVMConfig
    from pvm.vllm.refusals import ServedCheckpoint

    AutoConfig.register(Qwen3VLPVMConfig.model_type, Qwen3VLPVMConfig, exist_ok=True)
    for architecture in (ARCHITECTURE, REFERENCE_ARCHITECTURE):  # the authors', to refuse it with a reason
        MODELS_CONFIG_MAP[architecture] = ServedCheckpoint
        # By name: the class is imported where it is needed, with CUDA set up.
        ModelRegistry.register_model(architecture, f"pvm.vllm.model:{ARCHITECTURE}")
