"""What a checkpoint is, from its name and its config files; no weights are read."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub.errors import HFValidationError
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file

from configuration_qwen3vl_pvm import REFERENCE_ARCHITECTURE, Qwen3VLPVMConfig
from pvm.errors import UserError, reason
from variants_qwen3vl_pvm import BLOCKS


LARGEST_JSON = 2**24  # bytes; a config has a few thousand
MISSING_IS_NONE = {"_raise_exceptions_for_missing_entries": False}


def public_name(name: str) -> dict[str, Any]:
    """How to mention a model or data set to others: its `name` without folders, and whether it is `on_hub`."""
    is_file = Path(name).suffix in (".json", ".jsonl", ".parquet")
    on_hub = not Path(name).exists() and not is_file and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None
    return {"name": name if on_hub else Path(name).name, "on_hub": on_hub}


def not_found(name: str, error: Exception) -> UserError:
    """Why a name could not be loaded: what looks like a path is not called a Hub name."""
    path = Path(name)
    if name.startswith((".", "/", "~")) or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir()):
        return UserError(f"There is no folder {name}, and it is not a name on the Hub.")
    says = str(error).strip().partition("\n")[0]
    return UserError(f"{name} is not a folder, and could not be loaded from the Hub: {says}")


def stored_json(name: str, file_name: str, revision: str = "main") -> dict[str, Any]:
    """
    A JSON file of a folder or Hub name.

    Raises:
        UserError: if there is none, or it does not hold an object.
    """
    try:
        if Path(name).is_dir() and not Path(name, file_name).is_file():  # to open a named pipe would take forever
            raise UserError(
                f"{name} has no {file_name}, so it is not a checkpoint. Pass a folder written by train.py or "
                "save_pretrained, or a Hub name."
            )
        file = cached_file(name, file_name, revision=revision)
    except (OSError, HFValidationError) as error:
        raise not_found(name, error) from error
    with open(file, "rb") as stream:
        return read_object(stream, f"{name}/{file_name}")


def read_object(file: BinaryIO, name: str) -> dict[str, Any]:
    """
    The JSON object in a file.

    Args:
        name (`str`): for errors.

    Raises:
        UserError: if there is none, or the file is much larger than a config.
    """
    content = file.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise UserError(f"{name} has more than {LARGEST_JSON:,} bytes, which no such file has. Get it again.")
    return parse_object(content, name)


def parse_object(content: bytes, name: str, deepest: int = 20) -> dict[str, Any]:
    """
    The JSON object in `content`.

    Args:
        name (`str`): of the file, for errors.
        deepest (`int`): levels of objects and lists that it may have.

    Raises:
        UserError: if there is none.
    """
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not valid JSON: {reason(error)}. Get it again.") from error
    nested = [parsed] if isinstance(parsed, dict) else []
    for _ in range(deepest):
        items = (item for value in nested for item in (value.values() if isinstance(value, dict) else value))
        nested = [item for item in items if isinstance(item, (dict, list))]
    if not isinstance(parsed, dict) or nested:
        raise UserError(f"{name} does not hold a JSON object, or one that is too deep. Get it again.")
    return parsed


def stored_config(name: str, revision: str = "main") -> dict[str, Any]:
    """The config.json of a folder or Hub name, see [`stored_json`]."""
    return stored_json(name, CONFIG_NAME, revision)


def pvm_config(name: str, revision: str = "main") -> Qwen3VLPVMConfig:
    """
    The config of a PVM checkpoint.

    Raises:
        UserError: if its config.json does not describe one.
    """
    stored_config(name, revision)
    try:
        return Qwen3VLPVMConfig.from_pretrained(name, revision=revision)
    except Exception as error:  # libraries raise anything for a config that is damaged
        raise UserError(f"{name}/{CONFIG_NAME} does not describe a PVM model: {reason(error)}") from error


def checkpoint_kind(path: str, revision: str = "main") -> str:
    """
    The kind of checkpoint in a folder or under a Hub name: "stock", "pvm" or "peft" (a PEFT adapter).

    Raises:
        UserError: if it is none of these or does not exist.
    """
    try:
        is_peft = find_adapter_config_file(path, revision=revision) is not None
        has_config = not is_peft or cached_file(path, CONFIG_NAME, revision=revision, **MISSING_IS_NONE) is not None
    except OSError:
        is_peft, has_config = False, True  # stored_config says what is wrong
    stored = stored_config(path, revision) if has_config else {}
    model_type, architectures = stored.get("model_type"), stored.get("architectures")
    if model_type == Qwen3VLPVMConfig.model_type or architectures == [REFERENCE_ARCHITECTURE]:
        if is_peft:
            raise UserError(
                f"{path} holds a PVM checkpoint and a PEFT adapter ({PEFT_CONFIG_NAME}), which is loaded without the "
                "branches. Move one of them away."
            )
        if not isinstance(stored.get("text_config"), dict):
            raise UserError(f"{path}/{CONFIG_NAME} has no `text_config`. Get it again.")
        return "pvm"
    if is_peft:
        return "peft"
    if model_type != "qwen3_vl":
        raise UserError(
            f"{path} has the model type {model_type!r}. Supported are dense Qwen3-VL (`qwen3_vl`), PVM "
            f"(`{Qwen3VLPVMConfig.model_type}`) and PEFT adapters."
        )
    return "stock"


def branch_layers(path: str, revision: str = "main") -> list[int]:
    """The decoder layers with a branch; empty if the checkpoint has none."""
    return list(pvm_config(path, revision).text_config.pvm_layers) if branch_block(path, revision) else []


def branch_block(path: str, revision: str = "main") -> str | None:
    """
    The kind of a checkpoint's branches, a key of `BLOCKS`; `None` if it has none.

    Raises:
        UserError: if there is no such kind.
    """
    if checkpoint_kind(path, revision) != "pvm":
        return None
    block = stored_config(path, revision)["text_config"].get("pvm_block", "pvm")  # not in configs of release 0.1.0
    if not isinstance(block, str) or block not in BLOCKS:
        raise UserError(f"{path} has branches of the kind {block!r}, and this installation knows {', '.join(BLOCKS)}.")
    return block


def weight_pickles(files: Iterable[str]) -> list[str]:
    """The pickles among a checkpoint's files, but for those that the Trainer resumes from. They are never read."""
    of_trainer = ("optimizer.pt", "scheduler.pt", "scaler.pt", "training_args.bin", "rng_state")
    pickles = (file for file in files if file.endswith((".bin", ".pt", ".pth", ".pkl")))
    return [file for file in pickles if not file.startswith(of_trainer)]


def describe_block(block: str) -> str:
    """A kind of branch in a sentence: its name and the first sentence of its class's docstring."""
    docstring = " ".join((BLOCKS[block].__doc__ or f"{BLOCKS[block].__name__}.").split())
    return f"{block}: {docstring.partition('. ')[0].removesuffix('.')}."


def base_of(path: str, revision: str = "main") -> tuple[str, str] | None:
    """Name and revision of the base of an adapter checkpoint or PEFT adapter; `None` for a whole checkpoint."""
    is_peft = checkpoint_kind(path, revision) == "peft"
    stored = stored_json(path, PEFT_CONFIG_NAME if is_peft else CONFIG_NAME, revision)
    base, at = stored.get("base_model_name_or_path"), stored.get("revision" if is_peft else "base_model_revision")
    if not isinstance(base, str | None) or (is_peft and not base):
        raise UserError(f"{path} names no base: {base!r}. Write it into its config as `base_model_name_or_path`.")
    return base and (base, at or "main")


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
