"""The one way to write a file atomically."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """
    Write a text file (UTF-8) so that its path always holds either the old content or the complete new one.

    Args:
        path (`Path`): its folder must exist.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
