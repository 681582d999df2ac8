"""Writing files atomically, and one process at a time in an output folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pvm.errors import UserError


LOCK = ".lock"  # in an output folder while a process writes into it


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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Be the only process that writes into an output folder. The system releases the lock of a process that was killed.

    Args:
        folder (`Path`): created if it does not exist; removed again if nothing was written into it.

    Raises:
        UserError: if another process holds the lock, or the path cannot be a folder.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{folder} is a file, or inside one. Name a folder.") from error
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"Another process is writing into {folder}. Wait until it has finished, or choose another folder."
        ) from error
    try:
        yield
    finally:
        # Deleted before the release: after it, the file may be another process's.
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        if is_new:
            with suppress(OSError):
                folder.rmdir()
