"""The one exception that the command lines print as a sentence instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


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
        raise UserError(f"{subject}: {' '.join(str(error).split())}") from error
