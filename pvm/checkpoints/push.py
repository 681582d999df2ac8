"""Pushes a checkpoint to the Hub: only files that belong to it, in one commit."""

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from pvm.errors import UserError


# Nothing else is pushed: not the optimizer's state, which is a pickle, nor the run's own files, which hold paths.
HUB_FILES = (
    *("config.json", "generation_config.json", "training.json", "README.md", "results.png", "*.py"),
    *("model*.safetensors", "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors"),
    *("lora/adapter_config.json", "lora/adapter_model.safetensors"),
    *("*processor_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template*"),
)
BYTES_WITH_BARS = 10**9  # the Hub's bars, several at a time, are for long uploads; a training has a bar of its own
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*adapter_config.json")


def checkpoint_files(folder: Path) -> list[str]:
    """The files that belong to a checkpoint, relative to its folder."""
    files = [file.relative_to(folder).as_posix() for file in sorted([*folder.glob("*"), *folder.glob("lora/*")])]
    return [
        name
        for name in files
        if any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in HUB_FILES)
    ]


def push(
    folder: Path, repo_id: str, commit_message: str, revision: str | None = None, token: str | None = None
) -> CommitInfo:
    """
    Push a checkpoint in one commit, so that loading it gives all of it or all of the former one. The commit also
    deletes weights of other kinds that were in the repository.

    Args:
        folder (`Path`): of the checkpoint.
        repo_id (`str`): of the model on the Hub; it exists.
        revision (`str`, *optional*): the branch, created if it does not exist.

    Raises:
        UserError: if a file mentions a path of this machine.
    """
    names = checkpoint_files(folder)
    _refuse_paths(folder, names)
    api = HfApi(token=token)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    hide_bars = sum((folder / name).stat().st_size for name in names) < BYTES_WITH_BARS
    hide_bars = hide_bars and not are_progress_bars_disabled()
    if hide_bars:
        disable_progress_bars()
    try:
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=names,
            delete_patterns=list(WEIGHTS),
            commit_message=commit_message,
            revision=revision,
        )
    finally:
        if hide_bars:
            enable_progress_bars()


def _refuse_paths(folder: Path, names: list[str]) -> None:
    for name in names:
        # Vocabularies may contain words that look like paths.
        if name.endswith(".json") and name not in ("tokenizer.json", "vocab.json", "added_tokens.json"):
            for value in _strings(json.loads((folder / name).read_text(encoding="utf-8"))):
                if Path(value).is_absolute() and len(Path(value).parts) > 2:
                    raise UserError(
                        f"{folder / name} mentions {value}, a path of this machine, and was not pushed. Give the base "
                        "by its name on the Hub (--base_model_id), or push a whole checkpoint: "
                        f"python -m pvm convert {folder} FOLDER --to whole."
                    )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value if isinstance(value, list) else value.values():
            yield from _strings(item)
