"""The one exception that carries a message for the user."""


class UserError(ValueError):
    """A mistake that the user can mend; `main.py` prints its message alone, without a traceback, and exits with 2.

    The message says what was wrong, what is allowed and what to do.
    """
