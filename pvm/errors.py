"""The one exception that the command lines print as a sentence instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


# What libraries raise for values that they do not take, and for packages that are not installed.
REFUSALS = (ImportError, RuntimeError, TypeError, ValueError)


class UserError(ValueError):
    """Something the user can mend; the message says what is wrong, where, and what to do."""

    def __init__(self, message: str):
        # Of an error in a DataLoader's worker, torch raises the type again with a whole traceback as its message.
        super().__init__(message.rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2].rstrip())


class SetupError(UserError):
    """A `UserError` that met a row but lies elsewhere: it stops a run even where rows that are bad are skipped."""


@contextmanager
def user_errors(subject: str) -> Iterator[None]:
    """
    What a library refuses in here, where it only looks at values that the user gave, becomes a `UserError`. Also a
    decorator.
    """
    try:
        yield
    except UserError:
        raise
    except REFUSALS as error:
        raise UserError(f"{subject}: {' '.join(str(error).split())}") from error
