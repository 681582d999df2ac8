"""What can be trained: PVM branches, and the controls that a claim about them needs. One code path, one report."""

import importlib.util
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
from pvm.variants import VARIANTS


METHODS = ("pvm", "lora", "pvm+lora", *VARIANTS, "full")
BRANCHED = {
    "pvm": Qwen3VLPVMForConditionalGeneration,
    "pvm+lora": Qwen3VLPVMForConditionalGeneration,
    **VARIANTS,
}
# The linear layers of the decoder; not the vision tower's, whose layers are named otherwise.
LORA_TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"


@dataclass
class ModelArguments:
    """The base model, and what is trained in it."""

    model_name_or_path: str = field(metadata={"help": "Base checkpoint: a folder or a Hub name."})
    method: str = field(
        default="pvm",
        metadata={
            "help": "What trains: `pvm` the branches, `lora` adapters on the language model's linear layers, "
            "`pvm+lora` both; and, as controls, `mlp` branches with as many parameters that read no image, `full` "
            "every parameter. `token_gate`: branches whose gate depends on the token, an experiment.",
            "choices": METHODS,
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub checkpoint."})
    base_model_id: str | None = field(
        default=None,
        metadata={
            "help": "The base's name on the Hub, if --model_name_or_path is a copy of it on this machine: what is "
            "saved then names that and not the folder. A push needs it."
        },
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the frozen backbone; `auto` is the checkpoint's. What trains is float32 in any case, "
            "because AdamW's steps vanish in bfloat16.",
            "choices": ("auto", "float32", "bfloat16", "float16"),
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Keep the decoder's frozen linear layers in 4 bit (nf4; needs bitsandbytes)."},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "`sdpa` (default), `eager` or `flash_attention_2`."}
    )
    pvm_layers: list[int] | None = field(
        default=None, metadata={"help": "Decoder layers that get a branch; by default 2/9, 4/9 and 6/9 of the depth."}
    )
    pvm_hidden_size: int | None = field(default=None, metadata={"help": "Width of a branch (default 512)."})
    pvm_causal: bool | None = field(
        default=None, metadata={"help": "Whether text reads only the images before it (default true)."}
    )
    lora_rank: int | None = field(default=None, metadata={"help": "Rank of the LoRA adapters (default 16)."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Scale of the LoRA adapters, over their rank (default 32)."}
    )

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: for flags that the method does not use, or cannot.
        """
        for family, belongs in (("pvm", self.has_branches), ("lora", self.has_lora)):
            for flag, value in asdict(self).items():
                if flag.startswith(f"{family}_") and value is not None and not belongs:
                    raise UserError(f"--{flag} belongs to --method {family}, and the method is {self.method}.")
        if self.has_lora:
            self.lora_rank = 16 if self.lora_rank is None else self.lora_rank
            self.lora_alpha = 32 if self.lora_alpha is None else self.lora_alpha
            if min(self.lora_rank, self.lora_alpha) < 1:
                raise UserError("--lora_rank and --lora_alpha must be at least 1, or the adapters would be nothing.")

    @property
    def has_branches(self) -> bool:
        """Whether the method puts branches into the decoder."""
        return self.method in BRANCHED

    @property
    def has_lora(self) -> bool:
        """Whether the method puts adapters beside linear layers."""
        return self.method in ("lora", "pvm+lora")


def model_config(arguments: ModelArguments) -> PreTrainedConfig:
    """
    The config of the model that is trained: all that can be found wrong before anything large is read.

    Raises:
        UserError: if flags contradict one another, or the checkpoint is not there or does not fit the method.
    """
    name, revision, method = arguments.model_name_or_path, arguments.model_revision, arguments.method
    pvm_fields = {
        "pvm_layers": arguments.pvm_layers,
        "pvm_hidden_size": arguments.pvm_hidden_size,
        "pvm_causal": arguments.pvm_causal,
    }
    pvm_fields = {key: value for key, value in pvm_fields.items() if value is not None}
    if method == "full" and arguments.dtype not in ("auto", "float32"):
        raise UserError(
            f"--dtype {arguments.dtype} is for what stays frozen, and --method full trains everything, in float32. "
            "Leave it out; for mixed precision give --bf16 true."
        )
    if arguments.load_in_4bit and method == "full":
        raise UserError("--load_in_4bit is for what stays frozen, and --method full trains everything. Leave it out.")
    if arguments.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--load_in_4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if arguments.attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        raise UserError(
            "--attn_implementation flash_attention_2 needs a GPU and the package flash-attn. Install it, or take sdpa."
        )

    if revision != "main" and Path(name).is_dir():
        raise UserError(f"--model_revision {revision} is for the Hub, and {name} is a folder. Leave it out.")

    stored = stored_config(name, revision)
    try:
        if arguments.has_branches:
            return _branched_config(BRANCHED[method].config_class, name, revision, stored, pvm_fields)
    except ValueError as error:  # how our config refuses a checkpoint, in a sentence
        raise UserError(str(error)) from error
    if stored.get("model_type") != "qwen3_vl" or "pvm_layers" in stored.get("text_config", {}):
        raise UserError(
            f"--method {method} is a control and starts from a stock dense Qwen3-VL checkpoint; {name} is none (model "
            f"type {stored.get('model_type')}, architectures {stored.get('architectures')})."
        )
    return AutoConfig.from_pretrained(name, revision=revision)


def load_model(arguments: ModelArguments) -> PreTrainedModel | PeftModel:
    """
    The base model with everything frozen but what the method trains; that is float32.

    Raises:
        UserError: if the checkpoint does not fit the method, or flags contradict it.
    """
    name, method = arguments.model_name_or_path, arguments.method
    config = model_config(arguments)
    base, revision = base_model(arguments)
    loading = {
        "config": config,
        "revision": arguments.model_revision,
        "dtype": "float32" if method == "full" else arguments.dtype,
        "attn_implementation": arguments.attn_implementation,
    }
    if arguments.load_in_4bit:
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype="bfloat16" if arguments.dtype == "auto" else arguments.dtype,
            # The small vision tower and the head are worth their precision.
            llm_int8_skip_modules=[r".*\.visual", "lm_head"],
        )
    model_class = BRANCHED.get(method, AutoModelForImageTextToText)
    model, info = load_weights(model_class, name, **loading)
    missing = sorted(key for key in info["missing_keys"] if ".pvm_block." not in key)
    if missing:
        raise UserError(
            f"{name} lacks {len(missing)} of its backbone's weights, e.g. {missing[0]}: they would be random. Get the "
            "complete checkpoint."
        )

    model.requires_grad_(False)
    for block in pvm_blocks(model).values():
        block.requires_grad_(True).float()
    if arguments.has_branches and (model.config.base_model_name_or_path is None or arguments.base_model_id):
        model.config.base_model_name_or_path, model.config.base_model_revision = base, revision
    if arguments.method in ("lora", "pvm+lora"):
        lora = LoraConfig(
            r=arguments.lora_rank,
            lora_alpha=arguments.lora_alpha,
            target_modules=LORA_TARGETS,
            modules_to_save=["pvm_block"] if arguments.has_branches else None,
        )
        model = get_peft_model(model, lora)  # its weights are float32 over a backbone of any dtype
        lora.base_model_name_or_path, lora.revision = base, revision  # peft's own is the path as it was given
    elif arguments.method == "full":
        model.requires_grad_(True)
    return model


def base_model(arguments: ModelArguments) -> tuple[str, str | None]:
    """What a checkpoint calls the model that it was made from: a Hub name and a commit, or a folder and `None`."""
    name = arguments.model_name_or_path
    if not Path(name).is_dir():
        config_file = cached_file(name, CONFIG_NAME, revision=arguments.model_revision)
        return name, extract_commit_hash(config_file, None)
    return arguments.base_model_id or str(Path(name).absolute()), None


def _branched_config(
    config_class: type[Qwen3VLPVMConfig], name: str, revision: str, stored: dict[str, Any], pvm_fields: dict[str, Any]
) -> Qwen3VLPVMConfig:
    config = config_class.from_pretrained(name, revision=revision)
    if config.peft_adapter is not None:
        raise UserError(
            f"{name} holds a LoRA adapter beside its branches, and training does not go on from both. Merge it: "
            f"python -m pvm convert {name} FOLDER --to full, and start from that folder."
        )
    if "pvm_layers" not in stored.get("text_config", {}):
        # A stock checkpoint: its branches are made here, so the flags decide.
        text_config = {**config.text_config.to_dict(), "pvm_layers": None, **pvm_fields}
        return config_class.from_dict({**config.to_dict(), "text_config": text_config})
    for key, wanted in pvm_fields.items():
        present = config.text_config.to_dict()[key]
        if present != wanted:
            raise UserError(
                f"{name} has branches with {key} = {present}, which --{key} {wanted} contradicts. Leave the flag out "
                "to train them on, or start from the stock checkpoint."
            )
    return config
