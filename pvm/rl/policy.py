"""What GRPO trains: a checkpoint of the first stage, and which of its weights."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import cached_file

from pvm.checkpoints.loading import load_weights
from pvm.checkpoints.names import base_of, branch_layers, checkpoint_kind
from pvm.checkpoints.record import RECORD, read_record
from pvm.errors import UserError
from pvm.training.methods import ModelArguments, base_model, load_model, model_config


# What trains, and the method of the first stage that loads it.
TRAINS = {
    "language_model+branches": "pvm",
    "branches": "pvm",
    "branches+lora": "pvm+lora",
    "language_model": "full",
    "lora": "lora",
}


@dataclass
class PolicyArguments(ModelArguments):
    """The checkpoint of the first stage, and what is trained in it."""

    model_name_or_path: str = field(
        metadata={
            "help": "Checkpoint of the first stage, a folder or a Hub name: one with PVM branches, adapter or whole; "
            "without branches, for the controls, a whole model or a PEFT adapter."
        }
    )
    trains: str = field(
        default="language_model+branches",
        metadata={
            "help": "What to train. With branches: `language_model+branches` (the paper's), `branches`, "
            "`branches+lora`. The controls without: `language_model`, `lora`. Vision tower and projector are frozen.",
            "choices": list(TRAINS),
        },
    )
    # No flags: the checkpoint decides, and trl would round what trains in a quantised model.
    load_in_4bit: bool = field(init=False, default=False)
    method: str = field(init=False, default="pvm")
    pvm_block: str | None = field(init=False, default=None)
    pvm_layers: list[int] | None = field(init=False, default=None)
    pvm_hidden_size: int | None = field(init=False, default=None)
    pvm_causal: bool | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: for flags that what is trained does not use.
        """
        self.method = TRAINS[self.trains]
        super().__post_init__()
        if self.trains_language_model:
            if self.dtype not in ("auto", "float32"):
                raise UserError(
                    f"--trains {self.trains} trains the language model in float32, because AdamW's steps vanish in "
                    "anything smaller. Leave out --dtype; for mixed precision use --bf16 true."
                )
            self.dtype = "float32"

    @property
    def trains_language_model(self) -> bool:
        """Whether the language model's own weights train, so that checkpoints are whole."""
        return self.trains in ("language_model+branches", "language_model")


def policy_config(arguments: PolicyArguments) -> PreTrainedConfig:
    """
    The config of the model to train. Finds what can be found wrong without reading weights.

    Raises:
        UserError: if the checkpoint does not exist, or does not suit what is trained.
    """
    name, revision = arguments.model_name_or_path, arguments.model_revision
    kind = checkpoint_kind(name, revision)
    if arguments.has_branches and (kind != "pvm" or not branch_layers(name, revision)):
        raise UserError(
            f"--trains {arguments.trains} starts from PVM branches that were trained, and {name} has none. Train them "
            "with train.py first, or choose --trains language_model or lora."
        )
    if kind == "peft" and arguments.trains != "lora":
        raise UserError(
            f"{name} is a PEFT adapter, which --trains lora trains further. For --trains {arguments.trains}, merge it "
            "into its base first: peft's merge_and_unload, then save_pretrained."
        )
    if kind == "peft" and (arguments.lora_rank, arguments.lora_alpha) != (16, 32):
        raise UserError(
            f"{name} has a LoRA adapter, which is trained further. Leave out --lora_rank and --lora_alpha."
        )
    config = model_config(base_arguments(arguments))
    if "quantization_config" in config:
        raise UserError(
            f"{name} is quantised, and trl would round what trains in it to bfloat16. Start from its base."
        )
    return config


def base_arguments(arguments: PolicyArguments) -> PolicyArguments:
    """The same for the model that a PEFT adapter belongs to; other checkpoints are models themselves."""
    name, revision = arguments.model_name_or_path, arguments.model_revision
    if checkpoint_kind(name, revision) != "peft":
        return arguments
    base, base_revision = base_of(name, revision)
    return replace(arguments, model_name_or_path=base, model_revision=base_revision)


def policy_settings(arguments: PolicyArguments) -> dict[str, Any]:
    """What [`pvm.training.resume.run_settings`] does not know of a second stage: what trains, and the first stage."""
    name, revision = arguments.model_name_or_path, arguments.model_revision
    settings: dict[str, Any] = {"method": arguments.trains}
    settings["base_model"], settings["base_revision"] = base_model(base_arguments(arguments))
    if checkpoint_kind(name, revision) == "peft":
        adapter = PeftConfig.from_pretrained(name, revision=revision).to_dict()
        settings |= {"lora_rank": adapter.get("r"), "lora_alpha": adapter.get("lora_alpha")}
    record = cached_file(name, RECORD, revision=revision, _raise_exceptions_for_missing_entries=False)
    previous = read_record(Path(record).parent) if record else None
    return {**settings, "previous": previous}


def load_policy(arguments: PolicyArguments) -> PreTrainedModel | PeftModel:
    """
    The model, frozen but for what trains, which is in float32.

    Raises:
        UserError: if the checkpoint is incomplete or does not suit what is trained.
    """
    config = policy_config(arguments)
    name, revision, base = arguments.model_name_or_path, arguments.model_revision, base_arguments(arguments)
    if base is not arguments:
        loading = {"dtype": arguments.dtype, "attn_implementation": arguments.attn_implementation}
        model = load_weights(
            AutoModelForImageTextToText,
            base.model_name_or_path,
            config=config,
            revision=base.model_revision,
            **loading,
        )
        return PeftModel.from_pretrained(model, name, revision=revision, is_trainable=True)
    model = load_model(arguments)
    if arguments.trains_language_model:
        model.requires_grad_(True)
        model.model.visual.requires_grad_(False)
    return model
