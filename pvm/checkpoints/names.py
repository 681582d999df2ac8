"""What a checkpoint is, from its name and its config files; no weights are read."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from peft import PeftConfig
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file

from configuration_qwen3vl_pvm import REFERENCE_ARCHITECTURE, Qwen3VLPVMConfig
from pvm.errors import UserError
from variants_qwen3vl_pvm import BLOCKS


def public_name(name: str) -> dict[str, Any]:
    """How to mention a model or data set to others: its `name` without folders, and whether it is `on_hub`."""
    is_file = Path(name).suffix in (".json", ".jsonl", ".parquet")
    on_hub = not Path(name).exists() and not is_file and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None
    return {"name": name if on_hub else Path(name).name, "on_hub": on_hub}


def stored_config(name: str, revision: str = "main") -> dict[str, Any]:
    """
    The config.json of a folder or Hub name.

    Raises:
        UserError: if there is none.
    """
    try:
        stored, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except (OSError, HFValidationError) as error:
        where = "" if Path(name).is_dir() else " is not a folder, and"
        reason = str(error).partition("\n")[0]
        raise UserError(f"{name}{where} could not be loaded: {reason}") from error
    if not stored:
        raise UserError(
            f"{name} has no config.json, so it is not a checkpoint. Pass a folder written by train.py or "
            "save_pretrained, or a Hub name."
        )
    return stored


def checkpoint_kind(path: str, revision: str = "main") -> str:
    """
    The kind of checkpoint in a folder or under a Hub name: "stock", "pvm" or "peft" (a PEFT adapter).

    Raises:
        UserError: if it is none of these or does not exist.
    """
    try:
        if find_adapter_config_file(path, revision=revision) is not None:
            return "peft"
    except OSError:
        pass  # stored_config says what is wrong
    stored = stored_config(path, revision)
    model_type, architectures = stored.get("model_type"), stored.get("architectures")
    if model_type == Qwen3VLPVMConfig.model_type or architectures == [REFERENCE_ARCHITECTURE]:
        return "pvm"
    if model_type != "qwen3_vl":
        raise UserError(
            f"{path} has the model type {model_type!r}. Supported are dense Qwen3-VL (`qwen3_vl`), PVM "
            f"(`{Qwen3VLPVMConfig.model_type}`) and PEFT adapters."
        )
    return "stock"


def branch_layers(path: str, revision: str = "main") -> list[int]:
    """The decoder layers with a branch; empty if the checkpoint has none."""
    return stored_config(path, revision)["text_config"]["pvm_layers"] if branch_block(path, revision) else []


def branch_block(path: str, revision: str = "main") -> str | None:
    """
    The kind of a checkpoint's branches, a key of `BLOCKS`; `None` if it has none.

    Raises:
        UserError: if there is no such kind.
    """
    if checkpoint_kind(path, revision) != "pvm":
        return None
    block = stored_config(path, revision)["text_config"].get("pvm_block", "pvm")  # not in configs of release 0.1.0
    if block not in BLOCKS:
        raise UserError(f"{path} has branches of the kind {block!r}, and this installation knows {', '.join(BLOCKS)}.")
    return block


def describe_block(block: str) -> str:
    """A kind of branch in a sentence: its name and the first sentence of its class's docstring."""
    docstring = " ".join((BLOCKS[block].__doc__ or f"{BLOCKS[block].__name__}.").split())
    return f"{block}: {docstring.partition('. ')[0].removesuffix('.')}."


def base_of(path: str, revision: str = "main") -> tuple[str, str] | None:
    """Name and revision of the base of an adapter checkpoint or PEFT adapter; `None` for a whole checkpoint."""
    if checkpoint_kind(path, revision) == "peft":
        config = PeftConfig.from_pretrained(path, revision=revision)
        return config.base_model_name_or_path, config.revision or "main"
    stored = stored_config(path, revision)
    base = stored.get("base_model_name_or_path")
    return base and (base, stored.get("base_model_revision") or "main")


def checkpoint_state(path: str) -> list[Any]:
    """
    Changes whenever the checkpoint or its base does: the commit of a Hub name; names, sizes and modification times of
    the files of a folder (with those of a LoRA adapter in `lora/`).
    """
    base = base_of(path)
    return [commit_of(path) or _files(path), base and (commit_of(*base) or _files(base[0]))]


def commit_of(path: str, revision: str = "main") -> str | None:
    """The commit that a revision of a Hub name stands for; `None` for a folder."""
    if Path(path).is_dir():
        return None
    config = PEFT_CONFIG_NAME if checkpoint_kind(path, revision) == "peft" else CONFIG_NAME
    return extract_commit_hash(cached_file(path, config, revision=revision), None)


def _files(path: str) -> list[list[Any]]:
    folder = Path(path)
    files = sorted(file for file in [*folder.iterdir(), *folder.glob("lora/*")] if file.is_file())
    return [[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
