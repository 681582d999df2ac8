"""The one exception that the command lines print as a sentence instead of a traceback."""


class UserError(ValueError):
    """Something the user can mend; the message says what is wrong, where, and what to do."""
