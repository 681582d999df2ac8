"""What checkpoints and data sets are called, and what a checkpoint's config says before anything is loaded."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from transformers.configuration_utils import PreTrainedConfig

from pvm.errors import UserError


def public_name(name: str) -> dict[str, Any]:
    """What others may be told of a model or data set: its `name`, without folders, and whether it is `on_hub`."""
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
        reason = str(error).partition("\n")[0]
        raise UserError(f"{name} is no folder, and cannot be had from the Hub: {reason}") from error
    if not stored:
        raise UserError(
            f"{name} has no config.json, so it is no checkpoint. Name a folder that train.py or save_pretrained "
            "wrote, or a Hub name."
        )
    return stored
