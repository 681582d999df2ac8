"""The entry point in pyproject.toml: tells vLLM which class serves a PVM checkpoint."""

import logging


ARCHITECTURE = "Qwen3VLPVMForConditionalGeneration"
TESTED = ((0, 31), (0, 33))  # the first and the last version


def register() -> None:
    """Called by vLLM at the start of each of its processes, and sometimes twice. An exception would stop vLLM."""
    import vllm  # not above: this module is imported by vLLM

    if not TESTED[0] <= vllm.__version_tuple__[:2] <= TESTED[1]:
        logging.getLogger("vllm").warning(
            "PVM checkpoints were served with vLLM 0.31 to 0.33, and this is %s. If that fails, install one of those.",
            vllm.__version__,
        )
    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from pvm.vllm.refusals import ServedCheckpoint
    except ImportError as error:
        logging.getLogger("vllm").error("PVM checkpoints cannot be served: %s.", error)
        return

    from transformers import AutoConfig

    from configuration_qwen3vl_pvm import REFERENCE_ARCHITECTURE, Qwen3VLPVMConfig

    AutoConfig.register(Qwen3VLPVMConfig.model_type, Qwen3VLPVMConfig, exist_ok=True)
    for architecture in (ARCHITECTURE, REFERENCE_ARCHITECTURE):  # the authors', to refuse it with a reason
        MODELS_CONFIG_MAP[architecture] = ServedCheckpoint
        # By name, to be imported where it is needed.
        ModelRegistry.register_model(architecture, f"pvm.vllm.model:{ARCHITECTURE}")
