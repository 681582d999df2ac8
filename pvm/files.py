"""Files that appear under their name only when they are complete."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """
    Write a text file (UTF-8) so that a reader, or an interruption, finds the old content or all of the new one.

    Args:
        path (`Path`): its folder exists.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
