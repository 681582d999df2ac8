"""The one exception that the command lines print as a sentence instead of a traceback."""


class UserError(ValueError):
    """Something the user can mend; the message says what is wrong, where, and what to do."""

    def __init__(self, message: str):
        # Of an error in a DataLoader's worker, torch raises the type again with a whole traceback as its message.
        super().__init__(message.rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2].rstrip())


class SetupError(UserError):
    """A `UserError` that met a row but lies elsewhere: it stops a run even where rows that are bad are skipped."""
