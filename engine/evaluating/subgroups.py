"""Subgroups of images by a column of a table: sex, age, view, site."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.predicting.table import Predictions
from loaders.errors import UserError, check_regular, reading, shorten, unknown

BANDS = (20.0, 40.0, 60.0, 80.0)
"""Where bands of a number begin unless they are named: years of age."""
_VALUES = 8
"""A column with more distinct numbers is split into bands."""
_NUMBER = re.compile(r"([-+]?\d+(?:\.\d*)?)\s*([YMWD]?)", re.IGNORECASE)
_YEARS = {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
"""Units of an age as DICOM writes it, such as 045Y or 006M."""
_MOST = 50


@dataclass(frozen=True)
class Subgroups:
    """Images by the value that a column has for them."""

    column: str
    rows: dict[str, np.ndarray]  # value → (n,) bool, in order
    unknown: int  # images that the table has no value for
    joined: str  # how rows of the table were matched, for people


def read(path: Path, column: str, predictions: Predictions, bands: Sequence[float] | None = None) -> Subgroups:
    """The subgroups that a CSV makes of predicted images, matched by whichever of its columns holds most of the images'
    keys, of the file names in them, or of their groups.

    UserError: no such column, no match, rows that contradict each other, or fewer than two subgroups.
    """
    check_regular(path)
    with reading(path, "a CSV"), open(path, newline="", encoding="utf-8-sig") as file:
        table = list(csv.DictReader(file, strict=True, restval=""))
        header = [name for name in (table[0] if table else {}) if name is not None]
    if column not in header:
        raise unknown(f"column of {path}", column, header) if header else UserError(f"{path} has no rows")
    ids, by, what = _matched(table, [name for name in header if name != column], predictions, path)
    value_of: dict[str, str] = {}
    for row in table:
        value = row[column].strip()
        if value_of.setdefault(row[by].strip(), value) != value:
            raise UserError(
                f"{path}: {by} {row[by].strip()} has the {column} {value_of[row[by].strip()]!r} in one row and "
                f"{value!r} in another; which is right?"
            )
    values = [value_of.get(each, "") for each in ids]
    found = _split(values, bands, column)
    if len(found) < 2:
        raise UserError(
            f"{path}: of these images the column {column} has {', '.join(found) or 'no value'}, which makes no two "
            "subgroups; name another column, or --bands where those of a number begin"
        )
    names = np.array(values, dtype=object)
    return Subgroups(column, found, int((names == "").sum()), f"{by} of {path} = {what}")


def _matched(
    table: Sequence[dict[str, str]], columns: Sequence[str], predictions: Predictions, path: Path
) -> tuple[list[str], str, str]:
    """What each image is called in the table, in which column, and what that is."""
    candidates = {
        "key": predictions.keys,
        "file name": [key.replace("\\", "/").rpartition("/")[2] for key in predictions.keys],
        "group": predictions.groups,
    }
    best: tuple[int, list[str], str, str] = (0, [], "", "")
    for by in columns:
        there = {row[by].strip() for row in table if row[by]} - {""}
        for what, ids in candidates.items():
            if (count := sum(each in there for each in ids)) > best[0]:
                best = (count, ids, by, what)
    count, ids, by, what = best
    if not count:
        raise UserError(
            f"{path}: no column ({shorten(columns) or 'besides that one there is none'}) holds keys, file names or "
            f"groups of the predictions, such as {predictions.keys[0]!r} or {predictions.groups[0]!r}"
        )
    return ids, by, f"{what} ({count:,} of {len(ids):,} images)"


def _split(values: Sequence[str], bands: Sequence[float] | None, column: str) -> dict[str, np.ndarray]:
    """Value → (n,) bool; numbers in bands where these are named, or where there are many."""
    there = sorted({value for value in values if value})
    numbers = {value: _number(value) for value in there}
    if bands is not None and None in numbers.values():
        wrong = next(value for value, number in numbers.items() if number is None)
        raise UserError(f"--bands: the column {column} holds {wrong!r}, which is no number")
    if there and None not in numbers.values() and (bands is not None or len(there) > _VALUES):
        edges = [-math.inf, *(BANDS if bands is None else bands), math.inf]
        of_images = np.array([np.nan if not value else numbers[value] for value in values], dtype=np.float64)
        chosen = {
            _band(low, high): (of_images >= low) & (of_images < high)
            for low, high in zip(edges, edges[1:], strict=False)
        }
        return {name: rows for name, rows in chosen.items() if rows.any()}
    if len(there) > _MOST:
        most = ", ".join(f"{value} ({count:,})" for value, count in Counter(values).most_common(3))
        raise UserError(f"the column {column} has {len(there):,} values ({most}, …): too many for subgroups")
    names = np.array(values, dtype=object)
    return {value: names == value for value in there}


def _number(text: str) -> float | None:
    match = _NUMBER.fullmatch(text)
    return float(match[1]) * _YEARS[match[2].upper()] if match else None


def _band(low: float, high: float) -> str:
    if math.isinf(low):
        return f"< {high:g}"
    return f"{low:g} or more" if math.isinf(high) else f"{low:g} to < {high:g}"
