"""Names of files as text that can be stored, printed and turned back, whatever bytes they are of."""

import os
import re
from collections.abc import Sequence

_ESCAPE = re.compile("%([0-9A-F]{2})")
_AWKWARD = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # control characters; stand-ins for bytes
_TO_ESCAPE = re.compile(r"[\x00-\x1f%\x7f\ud800-\udfff]")


def as_text(path: str) -> str:
    """A path as Python has it from the system, in plain text.

    Each part of it that is UTF-8 without control characters stays as it is. In others each byte that is none, each
    control character and each % becomes % and two digits, as in `caf%E9.jpg`; and so it does in what could be taken for
    such a part, so that `as_name` always turns it back.
    """
    if path.isprintable() and "%" not in path:
        return path
    return "/".join(_escaped(part) if _must_be_escaped(part) else part for part in path.split("/"))


def as_name(text: str) -> str:
    """The path that `as_text` made this of."""
    if "%" not in text:
        return text
    return "/".join(_unescaped(part) if _is_escaped(part) else part for part in text.split("/"))


def typed(word: str) -> str:
    """What a person typed for a path in text: as it is printed, or with the bytes of the name itself."""
    return as_text(word) if _AWKWARD.search(word) else word


def telling_apart(paths: Sequence[str]) -> list[str]:
    """For each of these files the shortest text that no other has: its name, or its path below the folder of all."""
    names = [os.path.basename(path) for path in paths]
    if len(set(names)) < len(names):
        above = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        names = [os.path.relpath(path, above) for path in paths]
    return [as_text(name) for name in names]


def _must_be_escaped(part: str) -> bool:
    return bool(_AWKWARD.search(part)) or _is_escaped(part)


def _is_escaped(part: str) -> bool:
    """Whether `as_text` makes this of some name."""
    if not _ESCAPE.search(part):
        return False
    name = _unescaped(part)
    return _escaped(name) == part and _is_of_the_system(name) and _must_be_escaped(name)


def _is_of_the_system(name: str) -> bool:
    """Not so where stand-ins are next to one another that would be a character together."""
    return name.encode(errors="surrogateescape").decode(errors="surrogateescape") == name


def _escaped(name: str) -> str:
    return _TO_ESCAPE.sub(lambda each: f"%{ord(each[0]) & 0xFF:02X}", name)


def _unescaped(part: str) -> str:
    def original(escape: re.Match[str]) -> str:
        byte = int(escape[1], 16)
        return chr(byte if byte < 0x80 else 0xDC00 + byte)

    return _ESCAPE.sub(original, part)
