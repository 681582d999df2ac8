"""How commands print: text from checkpoints, data and paths reaches the terminal as text, and as nothing else."""

import logging
import re
import sys
import unicodedata
import warnings

from rich.console import Console


COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # which libraries put into what they log
ALLOWED = "\n\t\u200c\u200d"  # Persian and emoji need the joiners


def printable(text: str) -> str:
    """
    The text without colours, and with control characters, marks of text direction and halves of surrogate pairs (as in
    the names of files that are not UTF-8) as escapes.
    """
    text = COLOUR.sub("", text)
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in ALLOWED
        else character
        for character in text
    )


class Terminal(Console):
    """A rich console that takes text as it is, also in tables: without markup, emoji codes or control characters."""

    def __init__(self, **kwargs):
        super().__init__(soft_wrap=True, markup=False, emoji=False, highlight=False, **kwargs)

    def render_str(self, text, **kwargs):
        return super().render_str(printable(text), **kwargs)


class PrintableRecord(logging.LogRecord):
    """A log record whose message is printable."""

    def getMessage(self) -> str:
        return printable(super().getMessage())


def prepare_terminal() -> None:
    """For the start of a command: logs and warnings are printable, and no character stops a print."""
    logging.setLogRecordFactory(PrintableRecord)
    as_usual = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: printable(as_usual(*args, **kwargs))  # documented as replaceable
    sys.stdout.reconfigure(errors="backslashreplace")
