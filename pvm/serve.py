"""
Serve a checkpoint with an OpenAI-compatible API, by transformers' own server, which loads no classes but its own:

    pvm serve runs/my_pvm --port 8000
    transformers chat runs/my_pvm --base-url http://localhost:8000

Every option of `transformers serve` can be added. One request is answered at a time; for many, see docs/serving.md.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from transformers import AutoConfig, AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration
from pvm.checkpoints.names import checkpoint_kind
from pvm.errors import UserError


def register() -> None:
    """Make the PVM classes known to transformers, which then need no `trust_remote_code`."""
    model_type, model_class = Qwen3VLPVMConfig.model_type, Qwen3VLPVMForConditionalGeneration
    AutoConfig.register(model_type, Qwen3VLPVMConfig, exist_ok=True)
    AutoModelForMultimodalLM.register(Qwen3VLPVMConfig, model_class, exist_ok=True)
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[model_type] = model_class.__name__  # where the server looks


def main(arguments: list[str] | None = None) -> None:
    """
    The command `pvm serve`.

    Raises:
        UserError: if the server's packages are not installed, or it cannot serve the checkpoint.
    """
    parser = ArgumentParser(
        "pvm serve", description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name", metavar="NAME", help="folder or Hub name of a whole, adapter or stock checkpoint")
    args, options = parser.parse_known_args(arguments)
    if not is_serve_available():
        raise UserError(
            "transformers' server needs packages that are not installed: pip install fastapi uvicorn openai"
        )
    if checkpoint_kind(args.name) == "peft":
        raise UserError(
            f"{args.name} is a PEFT adapter, which transformers' server does not load. Serve its base with vLLM and "
            "`--enable-lora --lora-modules`, or merge it."
        )
    from transformers.cli.transformers import app  # imports the packages looked for above

    register()
    app(["serve", args.name, *options])
