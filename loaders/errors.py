"""The one error that is meant for the person at the keyboard."""

import difflib
from collections.abc import Iterable, Sequence

_SHOWN = 8  # names listed in a message before "…"


class UserError(ValueError):
    """Input that cannot be used. The message says what was found, what was expected, and what to do.

    Command lines print it as `error: …` and exit with code 2; anything else that escapes is a defect of ours.
    """


def shorten(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:_SHOWN]) + (f", … ({len(names):,} in all)" if len(names) > _SHOWN else "")


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is none of the known ones; it says which is nearest, and all there are."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"there is no {what} {name!r}; {hint}there are: {', '.join(known)}")
