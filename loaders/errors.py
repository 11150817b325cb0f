"""The one error that is meant for the person at the keyboard."""

from collections.abc import Sequence

_SHOWN = 8  # names listed in a message before "…"


class UserError(ValueError):
    """Input that cannot be used. The message says what was found, what was expected, and what to do.

    Command lines print it as `error: …` and exit with code 2; anything else that escapes is a defect of ours.
    """


def shorten(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:_SHOWN]) + (f", … ({len(names):,} in all)" if len(names) > _SHOWN else "")
