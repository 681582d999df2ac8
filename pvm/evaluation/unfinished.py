"""What an interrupted evaluation has done so far, so that the same line goes on with it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pvm.errors import UserError


class Unfinished:
    """
    The folder in which an evaluation keeps its parts until the report is written.

    Args:
        folder (`Path`): made if it is not there.
        settings (`dict`): what must be the same for parts to belong together, as JSON has it.
        overwrite (`bool`): forget parts of another evaluation.

    Raises:
        UserError: if the folder holds parts of another evaluation or damaged ones, or another process is at work in
            it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], overwrite: bool = False):
        self.folder, self.parts = folder, folder / "parts"
        settings = json.loads(json.dumps(settings))
        self.parts.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "lock")  # which ends with the process, however that ends
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"Another process is evaluating into {folder.parent}. Choose another --output_dir."
            ) from error
        file = folder / "settings.json"
        before = settings
        if file.is_file():
            try:
                before = self._read(file)
            except UserError:
                if not overwrite:
                    raise
                before = {}
        different = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
        if different and overwrite:
            shutil.rmtree(self.parts)
            self.parts.mkdir()
        elif different:
            raise UserError(
                f"{folder} holds an evaluation that was interrupted, and its {', '.join(different)} "
                f"{'was' if len(different) == 1 else 'were'} other than now. Give the same line to go on with it, or "
                "--overwrite true to begin anew, or choose another --output_dir."
            )
        self._write(file, settings)

    def journal(self, label: str) -> Path:
        """A file to add to while a part is in the making."""
        return self.parts / f"{label}.jsonl"

    def load(self, label: str) -> Any:
        """
        A part that is complete, or `None`.

        Raises:
            UserError: if its file is damaged.
        """
        file = self.parts / f"{label}.json"
        return self._read(file) if file.is_file() else None

    def save(self, label: str, part: Any) -> None:
        """Keep a complete part."""
        self._write(self.parts / f"{label}.json", part)
        self.journal(label).unlink(missing_ok=True)

    def remove(self) -> None:
        """Forget everything: the report is written."""
        self._lock.release()
        shutil.rmtree(self.folder)

    def _read(self, file: Path) -> Any:
        try:
            return json.loads(file.read_bytes())
        except ValueError as error:
            raise UserError(
                f"{file} is damaged, and what it held of the evaluation is lost. Delete {self.folder} to begin anew."
            ) from error

    def _write(self, file: Path, content: Any) -> None:
        # Under its name only once it is whole.
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, file)
