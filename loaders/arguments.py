"""How words that people type are read: places on disk, numbers with their ranges."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loaders.errors import UserError
from loaders.output import unspeakable

called: str | None = None
"""What the command that runs was called, where that was not `python -m`."""
PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")


def program(module: str, otherwise: str = "") -> str:
    """The name of a command in its usage, as it was called: `boosterbit pack`, or `python -m loaders.pack`.

    `otherwise`: what it is called where that is not by `boosterbit`, in the place of `python -m`.
    """
    return called or otherwise or f"python -m {module}"


def expanded(text: str) -> str:
    """A path as typed, with the home folder in place of `~` or `~user` at its start: the shell puts it there only where
    a word begins with it. UserError: no such user, or what cannot be the name of a file."""
    found = os.path.expanduser(text)
    if found.startswith("~") and not os.path.lexists(found):
        user = found.split("/")[0]
        raise UserError(f"{text!r}: there is no user {user[1:]!r}; for a file of that name write ./{user}")
    if "\0" in found:
        raise UserError(f"{text!r} cannot be the name of a file: it holds a NUL character")
    try:
        os.fsencode(found)
    except UnicodeEncodeError as error:
        raise UserError(unspeakable(error)) from error
    return found


def as_place(text: str) -> str:
    """`expanded` for `type=` of argparse."""
    try:
        return expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def as_path(text: str) -> Path:
    """The same as a `Path`."""
    return Path(as_place(text))


def as_settings(words: Sequence[str]) -> dict[str, str]:
    """What `--set KEY=VALUE`, any number of times, says. UserError for what is no such word, or says a key twice."""
    settings: dict[str, str] = {}
    for word in words:
        key, equals, value = (part.strip() for part in word.partition("="))
        if not key or not equals:
            raise UserError(f"--set {word}: expected KEY=VALUE")
        if key in settings:
            raise UserError(f"--set gives {key} twice, as {settings[key]!r} and {value!r}")
        settings[key] = value
    return dict(sorted(settings.items()))


def as_picture(text: str) -> Path:
    """The same of a file that ends as pictures do: told before hours of measuring, not after."""
    found = as_path(text)
    if found.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text} does not end as a picture does; expected {' or '.join(PICTURES)}")
    return found


class Number(argparse.Action):
    """An option that is a number within bounds, which its help shows in brackets:
    `add("--size", action=Number, within=(1, 8192), default=224, help="…")`. Whole, unless a bound is a float.

    UserError for what is none, of any other size, NaN and infinity among them.
    """

    def __init__(self, *words: Any, within: tuple[float, float], **more: Any) -> None:
        self._low, self._high = within
        self._whole = all(isinstance(bound, int) for bound in within)
        more["help"] = f"{more.get('help', '')} [{self._low:,} to {self._high:,}]".strip()
        super().__init__(*words, **more)

    def __call__(
        self, parser: argparse.ArgumentParser, found: argparse.Namespace, text: Any, option: Any = None
    ) -> None:
        setattr(found, self.dest, self._read(text, option or self.dest))

    def _read(self, text: str, name: str) -> float:
        kind = "a whole number" if self._whole else "a number"
        try:
            value = int(text) if self._whole else float(text)
        except ValueError:
            raise UserError(f"{name} is {text!r}; expected {kind}, {self._low:,} to {self._high:,}") from None
        if not self._low <= value <= self._high:
            raise UserError(f"{name} is {text}; expected {kind}, {self._low:,} to {self._high:,}")
        return value


SEEDS = (0, 2**32 - 1)
SIDE = (1, 8192)
"""Of images, pixels."""
COUNT = (1, 10**9)
WORKERS = (1, 1024)
"""Threads or processes."""
