"""The exceptions that the commands print as a sentence instead of a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from pvm.terminal import prepare_terminal, printable


# What libraries raise for values they do not accept and for packages that are not installed.
REFUSALS = (ImportError, RuntimeError, TypeError, ValueError)


class UserError(ValueError):
    """Something the user can fix; the message says what is wrong, where, and what to do."""

    def __init__(self, message: str):
        # For an error in a DataLoader worker, torch raises the same type with the whole traceback as its message.
        super().__init__(message.rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2].rstrip())


class SetupError(UserError):
    """Raised while a row is encoded, but not because of the row: it stops the run even if bad rows are skipped."""


@contextmanager
def user_errors(subject: str) -> Iterator[None]:
    """
    Turn the errors of a library into a `UserError`. Only for code that does nothing but look at values from the user.
    Also a decorator.

    Args:
        subject (`str`): starts the message: what failed, or the flag.
    """
    try:
        yield
    except UserError:
        raise
    except REFUSALS as error:
        raise UserError(f"{subject}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What an exception says, in one line, without huggingface_hub's "Class validation error for validator ..."."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    says = " ".join(str(error).split())
    return says if isinstance(error, (*REFUSALS, OSError)) and says else f"{type(error).__name__} {says}".rstrip()


@contextmanager
def ends_in_a_sentence(command: str, interrupted: str = "interrupted.") -> Iterator[None]:
    """
    Around the `main` of a command. Exit status: 2 for a `UserError`, as argparse; 1 if a file is damaged or cannot be
    read or written; 130 for Ctrl-C, as shells count it.

    Args:
        command (`str`): its name.
        interrupted (`str`): what to say after Ctrl-C.
    """
    prepare_terminal()
    try:
        if sys.getfilesystemencoding() != "utf-8":
            raise UserError(
                f"Python reads file names as {sys.getfilesystemencoding()}, and other characters in paths and data "
                "would get lost. Set the environment variable PYTHONUTF8=1."
            )
        yield
        return
    except BaseException as error:
        # An error that follows on Ctrl-C is part of it, for instance that workers do not answer any more.
        if any(isinstance(cause, KeyboardInterrupt) for cause in (error, error.__context__)):
            status, sentence = 130, interrupted
        elif isinstance(error, UserError):
            status, sentence = 2, f"error: {error}"
        elif isinstance(error, StrictDataclassError):
            status, sentence = 1, f"error: {reason(error)}"
        elif isinstance(error, (SafetensorError, OSError)):
            status, sentence = 1, f"error: {error}"
        else:
            raise
    print(printable(f"{command}: {sentence}"), file=sys.stderr)
    sys.exit(status)
