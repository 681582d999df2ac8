"""Finished parts of an evaluation, so that the same command resumes an interrupted one."""

import json
import shutil
from pathlib import Path
from typing import Any

from pvm.errors import UserError
from pvm.files import write_atomically


class Progress:
    """
    The folder that holds the finished parts of an evaluation until its report is written. For one process at a time.

    Args:
        folder (`Path`): created if it does not exist.
        settings (`dict`): JSON; parts made with other settings are not used.
        overwrite (`bool`): delete such parts instead of raising.

    Raises:
        UserError: if the folder holds parts of another evaluation or a damaged file.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], overwrite: bool = False):
        self.folder, self.parts = folder, folder / "parts"
        self.parts.mkdir(parents=True, exist_ok=True)
        file = folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        try:
            before = self._read(file) if file.is_file() else settings
        except UserError:
            if not overwrite:
                raise
            before = {}
        different = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
        if different and not overwrite:
            raise UserError(
                f"{folder} holds an interrupted evaluation with different {', '.join(different)}. Run the same "
                "command as then to resume it, give --overwrite true to start again, or choose another --output_dir."
            )
        if different:
            shutil.rmtree(self.parts)
            self.parts.mkdir()
        write_atomically(file, json.dumps(settings, ensure_ascii=False))

    def journal(self, label: str) -> Path:
        """The file to append to while a part is unfinished."""
        return self.parts / f"{label}.jsonl"

    def load(self, label: str) -> Any:
        """
        A finished part, or `None`.

        Raises:
            UserError: if its file is damaged.
        """
        file = self.parts / f"{label}.json"
        return self._read(file) if file.is_file() else None

    def save(self, label: str, part: Any) -> None:
        """Keep a finished part; its journal is deleted."""
        write_atomically(self.parts / f"{label}.json", json.dumps(part, ensure_ascii=False))
        self.journal(label).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder, once the report is written."""
        shutil.rmtree(self.folder)

    def _read(self, file: Path) -> Any:
        try:
            return json.loads(file.read_bytes())
        except ValueError as error:
            raise UserError(
                f"{file} is damaged and cannot be resumed from. Delete {self.folder} to start again."
            ) from error
