"""What can be trained: PVM branches, and the controls to compare them with."""

import importlib.util
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import CONFIG_NAME, is_flash_attn_2_available
from transformers.utils.hub import cached_file, extract_commit_hash

from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration, pvm_blocks
from pvm.checkpoints.loading import load_weights
from pvm.checkpoints.names import stored_config
from pvm.errors import UserError
from variants_qwen3vl_pvm import BLOCKS


METHODS = ("pvm", "lora", "pvm+lora", "full")
# The linear layers of the decoder; those of the vision tower have other names.
LORA_TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"


@dataclass
class ModelArguments:
    """The base model, and what is trained in it."""

    model_name_or_path: str = field(metadata={"help": "Base checkpoint: a folder or a Hub name."})
    method: str = field(
        default="pvm",
        metadata={
            "help": "What to train: `pvm` the branches, `lora` adapters of the language model's linear layers, "
            "`pvm+lora` both, `full` every parameter.",
            "choices": METHODS,
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub checkpoint."})
    base_model_id: str | None = field(
        default=None,
        metadata={
            "help": "The base's name on the Hub, if --model_name_or_path is a local copy of it: checkpoints then name "
            "it instead of the folder. Required to push."
        },
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the frozen weights; `auto` is the checkpoint's. Trained weights are always float32, "
            "because AdamW's steps vanish in bfloat16.",
            "choices": ("auto", "float32", "bfloat16", "float16"),
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Load the decoder's frozen linear layers in 4 bit (nf4; needs bitsandbytes)."},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "`sdpa` (default), `eager` or `flash_attention_2`."}
    )
    pvm_block: str | None = field(
        default=None,
        metadata={
            "help": "Kind of branch (default `pvm`): a key of BLOCKS in variants_qwen3vl_pvm.py. `parallel_mlp` is "
            "the control that does not see the image.",
            "choices": list(BLOCKS),
        },
    )
    pvm_layers: list[int] | None = field(
        default=None, metadata={"help": "Decoder layers with a branch; by default at 2/9, 4/9 and 6/9 of the depth."}
    )
    pvm_hidden_size: int | None = field(default=None, metadata={"help": "Width of a branch (default 512)."})
    pvm_causal: bool | None = field(
        default=None, metadata={"help": "Whether text attends only to the images before it (default true)."}
    )
    lora_rank: int | None = field(default=None, metadata={"help": "Rank of the LoRA adapters (default 16)."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "LoRA's alpha: the adapters are scaled by alpha / rank (default 32)."}
    )

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: for flags that the method does not use.
        """
        for family, belongs in (("pvm", self.has_branches), ("lora", self.has_lora)):
            for flag, value in asdict(self).items():
                if flag.startswith(f"{family}_") and value is not None and not belongs:
                    raise UserError(f"--{flag} belongs to --method {family}, and the method is {self.method}.")
        if self.has_lora:
            self.lora_rank = 16 if self.lora_rank is None else self.lora_rank
            self.lora_alpha = 32 if self.lora_alpha is None else self.lora_alpha
            if min(self.lora_rank, self.lora_alpha) < 1:
                raise UserError("--lora_rank and --lora_alpha must be at least 1.")

    @property
    def has_branches(self) -> bool:
        """Whether the method trains PVM branches."""
        return self.method in ("pvm", "pvm+lora")

    @property
    def has_lora(self) -> bool:
        """Whether the method trains LoRA adapters."""
        return self.method in ("lora", "pvm+lora")


def model_config(arguments: ModelArguments) -> PreTrainedConfig:
    """
    The config of the model to train. Finds everything that can be found wrong without reading weights.

    Raises:
        UserError: if flags contradict each other, or the checkpoint does not exist or does not suit the method.
    """
    name, revision, method = arguments.model_name_or_path, arguments.model_revision, arguments.method
    if method == "full" and arguments.dtype not in ("auto", "float32"):
        raise UserError(
            f"--dtype {arguments.dtype} is for frozen weights, and --method full trains all of them, in float32. "
            "Leave it out; for mixed precision use --bf16 true."
        )
    if arguments.load_in_4bit and method == "full":
        raise UserError("--load_in_4bit is for frozen weights, and --method full trains all of them. Leave it out.")
    if arguments.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--load_in_4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if arguments.attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        raise UserError(
            "--attn_implementation flash_attention_2 needs a GPU and the package flash-attn. Install it or use sdpa."
        )
    if revision != "main" and Path(name).is_dir():
        raise UserError(f"--model_revision {revision} is for Hub checkpoints, and {name} is a folder. Leave it out.")

    stored = stored_config(name, revision)
    has_branches = "pvm_layers" in (stored.get("text_config") or {})
    if arguments.has_branches:
        try:
            return _config_with_branches(arguments, has_branches)
        except ValueError as error:  # the config says in a sentence why it refuses a checkpoint
            raise UserError(str(error)) from error
    if stored.get("model_type") != "qwen3_vl" or has_branches:
        raise UserError(
            f"--method {method} is a control and starts from a stock dense Qwen3-VL checkpoint, which {name} is not "
            f"(model type {stored.get('model_type')}, architectures {stored.get('architectures')})."
        )
    return AutoConfig.from_pretrained(name, revision=revision)


def _config_with_branches(arguments: ModelArguments, has_branches: bool) -> Qwen3VLPVMConfig:
    name = arguments.model_name_or_path
    flags = {key: value for key, value in asdict(arguments).items() if key.startswith("pvm_") and value is not None}
    config = Qwen3VLPVMConfig.from_pretrained(name, revision=arguments.model_revision)
    if config.peft_adapter is not None:
        raise UserError(
            f"{name} has a LoRA adapter beside its branches, and training cannot start from both. Merge it: "
            f"python -m pvm convert {name} FOLDER --to whole, and start from that folder."
        )
    fields: dict[str, Any] = config.text_config.to_dict()
    if not has_branches:
        return Qwen3VLPVMConfig.from_dict({**config.to_dict(), "text_config": {**fields, "pvm_layers": None, **flags}})
    for key, wanted in flags.items():
        if fields[key] != wanted:
            raise UserError(
                f"{name} has branches with {key} = {fields[key]}, which --{key} {wanted} contradicts. Leave the flag "
                "out to train them further, or start from the stock checkpoint."
            )
    return config


def load_model(arguments: ModelArguments) -> PreTrainedModel | PeftModel:
    """
    The base model, frozen but for what the method trains, which is in float32.

    Raises:
        UserError: if flags contradict each other, or the checkpoint is incomplete or does not suit the method.
    """
    config = model_config(arguments)
    base, revision = base_model(arguments)
    loading = {
        "config": config,
        "revision": arguments.model_revision,
        "dtype": "float32" if arguments.method == "full" else arguments.dtype,
        "attn_implementation": arguments.attn_implementation,
    }
    if arguments.load_in_4bit:
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype="bfloat16" if arguments.dtype == "auto" else arguments.dtype,
            # The vision tower is small, and the head decides every token.
            llm_int8_skip_modules=[r".*\.visual", "lm_head"],
        )
    model_class = Qwen3VLPVMForConditionalGeneration if arguments.has_branches else AutoModelForImageTextToText
    model = load_weights(model_class, arguments.model_name_or_path, **loading)

    model.requires_grad_(arguments.method == "full")
    for block in pvm_blocks(model).values():
        block.requires_grad_(True).float()
    if arguments.has_branches and (config.base_model_name_or_path is None or arguments.base_model_id):
        model.config.base_model_name_or_path, model.config.base_model_revision = base, revision
    if arguments.has_lora:
        lora = LoraConfig(
            r=arguments.lora_rank,
            lora_alpha=arguments.lora_alpha,
            target_modules=LORA_TARGETS,
            modules_to_save=["pvm_block"] if arguments.has_branches else None,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft's use
            model = get_peft_model(model, lora)  # LoRA's weights are float32 over a backbone of any dtype
        lora.base_model_name_or_path, lora.revision = base, revision  # peft sets the path as it was given
    return model


def base_model(arguments: ModelArguments) -> tuple[str, str | None]:
    """The name and revision of the base that checkpoints record: a Hub name and commit, or a folder and `None`."""
    name = arguments.model_name_or_path
    if not Path(name).is_dir():
        config_file = cached_file(name, CONFIG_NAME, revision=arguments.model_revision)
        return name, extract_commit_hash(config_file, None)
    return arguments.base_model_id or str(Path(name).absolute()), None
