"""The one exception that the command lines print as a sentence instead of a traceback."""


class UserError(ValueError):
    """Something the user can mend; the message says what is wrong, where, and what to do."""


class SetupError(UserError):
    """A `UserError` that met a row but lies elsewhere: it stops a run even where rows that are bad are skipped."""
