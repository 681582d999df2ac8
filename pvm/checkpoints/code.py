"""The Python files that `trust_remote_code` would run, and where they are from."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import cached_file

import adapter_qwen3vl_pvm
from pvm.checkpoints.names import LARGEST_JSON
from pvm.checkpoints.stored import Files
from pvm.errors import reason


RELEASES = Path(__file__).with_name("releases.json")  # version -> code file -> SHA-256
CONFIGS = re.compile(r"[\w.-]*config[\w.-]*\.json")  # the files that transformers looks for `auto_map` in, and more
REFERENCE = re.compile(r"([\w-]+(?:/[\w-]+)*)\.\w+")
UNASKED = "custom_generate/generate"  # which transformers runs without a reference to it


def known_code() -> dict[tuple[str, str], str]:
    """Where code files are from, by name and SHA-256: this installation or a release."""
    releases = json.loads(RELEASES.read_text(encoding="utf-8"))
    known = {
        (file.name, hashlib.sha256(file.read_bytes()).hexdigest()): "this installation"
        for file in Path(adapter_qwen3vl_pvm.__file__).parent.glob("*_qwen3vl_pvm.py")
    }
    return known | {
        (name, sha256): f"release {version}" for version, files in releases.items() for name, sha256 in files.items()
    }


def check_code(files: Files, revision: str, code: dict[str, str]) -> Iterator[str]:
    """
    What config files name, and what these files import. Yields problems.

    Args:
        code (`dict[str, str]`): is filled with where each file is from: see [`known_code`], or "unknown".
    """
    references = {}
    for file_name in filter(CONFIGS.fullmatch, files.sizes):
        try:
            references |= dict.fromkeys(_references(files.json(file_name)), file_name)
        except Exception as error:  # see Inspection.part
            yield reason(error)
    known, modules = known_code(), [UNASKED] if f"{UNASKED}.py" in files.sizes else []
    for reference, file_name in references.items():
        inside = REFERENCE.fullmatch(reference)
        if inside and "--" not in reference:
            modules += [inside[1]] if inside[1] not in modules else []
        else:
            code[reference] = "unknown"
            yield f"{file_name} names code outside of this checkpoint: {reference}. Do not run it."
    for module in modules:  # more are added on the way
        file = f"{module}.py"
        size = files.size(file)
        if size is None:
            yield f"There is no {file}: trust_remote_code cannot load the checkpoint."
            continue
        code[file] = known.get((file, files.sha256(file)), "unknown") if size <= LARGEST_JSON else "unknown"
        if code[file] == "unknown":
            yield f"{file}, which trust_remote_code would run, is of no known release: read it."
        if size > LARGEST_JSON:
            continue
        try:
            imported = get_relative_imports(cached_file(files.name, file, revision=revision))
        except (OSError, UnicodeDecodeError) as error:
            yield f"{file}: {reason(error)}"
            continue
        folder = module.rpartition("/")[0]
        modules += sorted({f"{folder}/{name}".lstrip("/") for name in imported} - set(modules))


def _references(value: Any, is_code: bool = False) -> Iterator[str]:
    """The values of `auto_map`, and of `impl` in custom pipelines, at any depth."""
    if isinstance(value, str) and is_code:
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _references(item, is_code or key in ("auto_map", "impl"))
    elif isinstance(value, list):
        for item in value:
            yield from _references(item, is_code)
