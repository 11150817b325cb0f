"""From names of files and labels to classes: what all kinds of sources share."""

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from loaders.errors import UserError, shorten
from loaders.sources.listing import Table

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2"))
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_CLASSES = 1_000_000  # a greater class number is some other number: every class up to it would get a name


def expand(source: str) -> list[str]:
    """The files that a path or a pattern names, sorted: `*`, `?`, `[…]` as in a shell, `{000..146}` for a range."""
    ranges = _RANGE.search(source)
    if ranges:
        first, last = ranges.groups()
        numbers = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
        return [path for n in numbers for path in expand(source[: ranges.start()] + n + source[ranges.end() :])]
    if Path(source).exists() or not glob.has_magic(source):
        return [source]
    return sorted(glob.glob(source, recursive=True))


def is_image_name(name: str) -> bool:
    """Whether a path looks like an image by its extension; hidden files never do."""
    path = PurePosixPath(name)
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def with_classes(table: Table, labels: Sequence[int | str], source: str) -> tuple[Table, tuple[str, ...]]:
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
        if len(names) < len(set(labels)):
            raise UserError(f"{source}: some classes are both numbers and names, among {shorten(names)}")
    place = {name: number for number, name in enumerate(names)}
    rank = np.array([place[str(label)] for label in labels])
    return table.take(slice(None), rank[table.labels]), tuple(names)


def check_class_numbers(numbers: Iterable[int], source: str) -> None:
    """UserError unless all can be class numbers."""
    wrong = [number for number in numbers if not 0 <= number < _MOST_CLASSES]
    if wrong:
        raise UserError(f"{source}: {wrong[0]} is no class number; 0 to {_MOST_CLASSES - 1:,} are possible")
