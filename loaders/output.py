"""What commands print, whatever the terminal or pipe takes: around the `main` of each."""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from loaders.errors import UserError, in_words

UNREAD = 141
"""Exit code where whoever read the output has gone: what a shell gives other programs."""
PLAIN = {"→": "->", "±": "+-", "×": "x", "÷": "/", "–": "-", "—": "--", "…": "...", "─": "-", "★": "*", "¹": "1",
         "²": "2", "°": "deg", "⁽": "(", "⁾": ")"}  # fmt: skip
"""What stands for the characters that we use where an encoding lacks them; others become `\\u` and their number."""
_HANDLER = "boosterbit.plain"


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(PLAIN.get(each) or each.encode("ascii", "backslashreplace").decode() for each in lost), error.end


def printable() -> None:
    """Make stdout and stderr take any text: what their encoding lacks is spelled with what it has.

    Where a parent has closed one of them, it leads nowhere, or the next file that is opened would be it.
    """
    for number, mode, name in ((0, "r", "stdin"), (1, "w", "stdout"), (2, "w", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    codecs.register_error(_HANDLER, _plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def in_utf_8() -> bool:
    """Whether what is printed is written as UTF-8, as all text files are."""
    return codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"


def as_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command line and exit with its code.

    `… | head` ends it without a word, as it ends other programs. Output that cannot be written is an error, and so is
    a file name that the locale cannot spell, and what else a `UserError` or `OSError` says: code 2.
    """
    printable()
    try:
        code = main() or 0
    except SystemExit as end:
        code = _code(end)
    except BrokenPipeError:
        if not any(map(_unread, (sys.stdout, sys.stderr))):
            raise
        code = UNREAD
    except UnicodeEncodeError as error:
        print(f"error: {unspeakable(error)}", file=sys.stderr)
        code = 2
    except (UserError, OSError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        code = 2
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python flushes once more at its end
            unread = isinstance(error, BrokenPipeError)
            if not unread and stream is sys.stdout:
                print(f"error: the output cannot be written: {in_words(error)}", file=sys.stderr)
            code = code or (UNREAD if unread else 2)
    sys.exit(code)


def _unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def unspeakable(error: UnicodeEncodeError) -> str:
    """What to do about a name that the encoding of file names does not have."""
    return (
        f"{error.object!a} cannot be the name of a file where names are in {error.encoding}, as this locale says; "
        "export LC_ALL=C.UTF-8, or PYTHONUTF8=1"
    )


def _code(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1
