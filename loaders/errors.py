"""The one error that is meant for the person at the keyboard."""


class UserError(ValueError):
    """Input that cannot be used. The message says what was found, what was expected, and what to do.

    Command lines print it as `error: …` and exit with code 2; anything else that escapes is a defect of ours.
    """
