"""From names of files and labels to classes: what all kinds of sources share."""

import glob
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from loaders.errors import UserError, in_words
from loaders.sources.listing import UNKNOWN, Table

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2"))
_NO_TEXT = re.compile(r"[\udc80-\udcff]")  # what stands for bytes that are no UTF-8
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
_BETWEEN = re.compile(r"[\s,;|\[\]()]+")  # what stands between numbers of a list
_MISSING = frozenset(("", "nan", "+nan", "-nan", "<na>", "null"))
_MISSING_AMONG_NUMBERS = frozenset(("na", "n/a", "none", "nil", "missing", "unknown", "-", "?", "."))
_MOST_FILES = 100_000  # of a pattern with ranges
_MOST_CLASSES = 1_000_000  # a greater class number is some other number: every class up to it would get a name


def expand(source: str) -> list[str]:
    """The files that a path or a pattern names, sorted: `*`, `?`, `[…]` as in a shell, `{000..146}` for a range.

    UserError for ranges of more than 100,000 files together.
    """
    many = math.prod(max(int(last) - int(first) + 1, 0) for first, last in _RANGE.findall(source))
    if many > _MOST_FILES:
        raise UserError(f"{source} stands for {many:,} files; up to {_MOST_FILES:,} are possible: write smaller ranges")
    ranges = _RANGE.search(source)
    if ranges:
        first, last = ranges.groups()
        numbers = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
        return [path for n in numbers for path in expand(source[: ranges.start()] + n + source[ranges.end() :])]
    if Path(source).exists() or not glob.has_magic(source):
        return [source]
    _check_readable(source)
    return sorted(glob.glob(source, recursive=True))


def _check_readable(pattern: str) -> None:
    """UserError where a folder that the pattern leads through cannot be listed: `glob` leaves its files out."""
    above = os.path.dirname(pattern)
    if above and above != pattern and glob.has_magic(above):
        _check_readable(above)
    for folder in sorted(glob.glob(above, recursive=True)) if above else ["."]:
        if os.path.isdir(folder):
            try:
                os.scandir(folder).close()
            except OSError as error:
                said = in_words(error, folder)
                raise UserError(f"the folder {folder} cannot be read: {said}; {pattern} may miss files") from error


def is_image_name(name: str) -> bool:
    """Whether a path looks like an image by its extension; hidden files never do."""
    path = PurePosixPath(name)
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def check_label(label: object) -> int | str:
    """A label as a table, a file or a record has it, if it is one: a number of any spelling, or a name, as typed.

    ValueError with the reason for what is none: missing, negative or not whole, several at once, another type.
    """
    if isinstance(label, int) and not isinstance(label, bool):
        number: float | None = label
    elif isinstance(label, float):
        number = label
    elif isinstance(label, str):
        label = label.strip()
        if label.lower() in _MISSING:
            raise ValueError(f"the label is missing: {label!r}" if label else "the label is empty")
        if _NO_TEXT.search(label):
            raise ValueError(f"the label is {label!r}, no UTF-8; convert it, such as iconv -f latin1 -t utf-8")
        if not label.isprintable():
            raise ValueError(f"the label is {label!r}; a class number or name, in one line of text, is expected")
        words = [word for word in _BETWEEN.split(label) if word]
        if words and words != [label] and all(map(_NUMBER.fullmatch, words)):
            raise ValueError(f"the label is {label!r}, a list of numbers; one class per image is expected")
        number = float(label) if _NUMBER.fullmatch(label) else None
    else:
        kind = "null" if label is None else f"{label!r}, a {type(label).__name__}"
        raise ValueError(f"the label is {kind}; a class number or name is expected")
    if number is None:
        return str(label)
    if not number >= 0:
        raise ValueError(f"the label is {label}; class numbers are 0 or more, and {label} is no class number")
    if isinstance(number, float) and not number.is_integer():
        raise ValueError(f"the label is {label}, no whole number; a class number or name is expected")
    return label if isinstance(label, int | str) else int(label)


def check_known(text: str) -> float:
    """What a table says of one label among several: 1 or 0, NaN for unknown, which is nothing, -1 or nan.

    ValueError with the reason for anything else.
    """
    found = text.strip()
    if found.lower() in _MISSING:
        return math.nan
    value = float(found) if _NUMBER.fullmatch(found) else math.inf
    if value not in (0, 1, -1):
        raise ValueError(f"{text!r} is no label; expected 1, 0, or nothing (also -1) for unknown")
    return math.nan if value == -1 else value


def as_meant(labels: Sequence[int | str], source: str) -> list[int] | list[str]:
    """Labels that `check_label` returned as numbers, if all are: "3", "3.0" and "03" are 3; else as names, as typed.

    UserError where all are numbers but for such as "none" and "?": these stand for a missing label.
    """
    numbers = [_number(label) for label in labels]
    known = [number for number in numbers if number is not None]
    if len(known) == len(labels):
        return known
    names = [str(label) for label, number in zip(labels, numbers, strict=True) if number is None]
    if known and all(name.lower() in _MISSING_AMONG_NUMBERS for name in names):
        raise UserError(f"{source}: the label {names[0]!r} is missing among class numbers; give it a number or a name")
    return [str(label) for label in labels]


def _number(label: int | str) -> int | None:
    if isinstance(label, int):
        return label
    if label.isascii() and label.isdecimal():
        return int(label)
    return int(float(label)) if _NUMBER.fullmatch(label) else None


def with_classes(
    table: Table, labels: Sequence[int] | Sequence[str] | Sequence[int | str], source: str
) -> tuple[Table, tuple[str, ...]]:
    """The table, in which label k stands for `labels[k]`, with class numbers instead; and the names of the classes.

    Numbers stay as they are, and the classes go from 0 to the greatest. Names are numbered in their sorted order; a
    number among names is a name. UserError for numbers that cannot be class numbers.
    """
    numbers = [label for label in labels if isinstance(label, int)]
    if len(numbers) == len(labels):
        check_class_numbers(numbers, source)
        names = [str(number) for number in range(max(numbers) + 1)]
    else:
        names = sorted({str(label) for label in labels})
    place = {name: number for number, name in enumerate(names)}
    rank = np.array([*(place[str(label)] for label in labels), UNKNOWN])  # which stays what it is
    return table.take(slice(None), rank[table.labels]), tuple(names)


def check_class_numbers(numbers: Iterable[int], source: str) -> None:
    """UserError unless all can be class numbers."""
    wrong = [number for number in numbers if not 0 <= number < _MOST_CLASSES]
    if wrong:
        raise UserError(f"{source}: {wrong[0]} is no class number; 0 to {_MOST_CLASSES - 1:,} are possible")
