"""The columns of a file of predictions as they stand there, CSV or Parquet: found by name, turned into numbers."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.predicting import parquet
from loaders.errors import UserError, check_regular, reading, shorten

KEY, GROUP, LABEL, PROBABILITY, OF_LABEL = "key", "group", "label", "p:", "label:"


class Columns(NamedTuple):
    """A file as it was read, before it is checked."""

    header: list[str]
    keys: list[str]
    groups: list[str]
    probabilities: np.ndarray  # (n, k) float64, columns in the order of the header
    labels: list[list[str]]  # of each label column in the order of the header
    at: Places
    where: Callable[[int], str]  # says of a row where it is in the file


class Places(NamedTuple):
    """Where in a line the columns stand."""

    key: int
    group: int | None
    probabilities: list[int]
    labels: list[int]

    @property
    def used(self) -> list[int]:
        """All of them."""
        return sorted({self.key, *self.probabilities, *self.labels, *([] if self.group is None else [self.group])})


def places(header: list[str], path: Path) -> Places:
    """Where the columns stand. UserError where those of predictions are missing, or there twice."""
    twice = {name for name in header if header.count(name) > 1 and _is_ours(name)}
    if twice:
        raise UserError(f"{path}: the first line names the column {sorted(twice)[0]} twice")
    probabilities = [i for i, name in enumerate(header) if name.startswith(PROBABILITY)]
    if KEY not in header or not probabilities:
        lacking = KEY if KEY not in header else f"{PROBABILITY}NAME for a class or label"
        raise UserError(
            f"{path} has no column {lacking}: it has {shorten([name for name in header if name]) or 'none'}; a file of "
            f"predictions has {KEY}, {PROBABILITY}NAME for each class or label, and may have {GROUP}, and {LABEL} or "
            f"{OF_LABEL}NAME"
        )
    several = [i for i, name in enumerate(header) if name.startswith(OF_LABEL)]
    if several and LABEL in header:
        raise UserError(
            f"{path} has both {LABEL}, of one class per image, and {header[several[0]]}, of several labels at once; "
            "take one away"
        )
    names = [header[i][len(PROBABILITY) :] for i in probabilities]
    if "" in names:
        raise UserError(f"{path} has a column {PROBABILITY} without the name of a class or label")
    for i in several:
        if (name := header[i][len(OF_LABEL) :]) not in names:
            raise UserError(f"{path} has the column {header[i]} but not {PROBABILITY}{name}")
    labels = several or ([header.index(LABEL)] if LABEL in header else [])
    return Places(header.index(KEY), header.index(GROUP) if GROUP in header else None, probabilities, labels)


def _is_ours(name: str) -> bool:
    return name in (KEY, GROUP, LABEL) or name.startswith((PROBABILITY, OF_LABEL))


def is_parquet(path: Path) -> bool:
    """Whether a file of this name is written as Parquet."""
    return path.suffix.lower() == ".parquet"


def load(path: Path) -> Columns:
    """The columns of a file. UserError, with file, line and column, where these are not those of predictions."""
    check_regular(path)
    with reading(path, "a table of predictions", "name another"):
        return _of_parquet(path) if is_parquet(path) else _of_csv(path)


def _of_csv(path: Path) -> Columns:
    lines: list[int] = []
    keys: list[str] = []
    groups: list[str] = []
    values = array("d")
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(rows, [])]
            at = places(header, path)
            labels: list[list[str]] = [[] for _ in at.labels]
            for row in rows:
                if not row:
                    continue
                where = f"{path}, line {rows.line_num}"
                if len(row) != len(header):
                    raise UserError(f"{where}: {len(row):,} values, but the first line names {len(header):,}")
                values.extend(_numbers([row[column] for column in at.probabilities], header, at.probabilities, where))
                keys.append(row[at.key])
                groups.append("" if at.group is None else row[at.group].strip())
                for found, column in zip(labels, at.labels, strict=True):
                    found.append(row[column].strip())
                lines.append(rows.line_num)
        except csv.Error as error:
            raise UserError(f"{path}, line {rows.line_num}: this is no CSV: {error}") from error
    numbers = np.array(values).reshape(len(keys), len(at.probabilities))
    return Columns(header, keys, groups, numbers, labels, at, lambda row: f"line {lines[row]}")


def _numbers(cells: list[str], header: list[str], columns: list[int], where: str) -> list[float]:
    found = []
    for cell, column in zip(cells, columns, strict=True):
        try:
            found.append(_number(cell))
        except ValueError:
            raise UserError(
                f"{where}, column {header[column]}: {cell!r} is no number; expected a probability, 0 to 1"
            ) from None
    return found


def _number(text: str) -> float:
    """ValueError for what is none, also where Python would let it pass: `1_0`."""
    if "_" in text:
        raise ValueError(text)
    return float(text)


def _of_parquet(path: Path) -> Columns:
    header, columns = parquet.read(path, lambda names: places(names, path).used)
    at = places(header, path)
    text = {header[i]: list(map(_text, columns[header[i]])) for i in at.used if i not in at.probabilities}
    keys = text[header[at.key]]
    return Columns(
        header,
        keys,
        [""] * len(keys) if at.group is None else text[header[at.group]],
        np.stack([_column(columns[header[i]], header[i], path) for i in at.probabilities], axis=1),
        [text[header[i]] for i in at.labels],
        at,
        lambda row: f"row {row + 1}",
    )


def _text(value: Any) -> str:
    """A value of a column as CSV would have it."""
    if value is None or value != value:
        return ""
    if isinstance(value, float | bool | np.bool_) and float(value).is_integer():
        value = int(value)
    return str(value)


def _column(values: np.ndarray, name: str, path: Path) -> np.ndarray:
    try:
        return values.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}, column {name}: it holds no numbers; expected probabilities, 0 to 1") from error
