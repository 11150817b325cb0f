"""The predictions file: a row for each image.

    key,group,p:normal,p:pneumonia,label             one of several classes: probabilities that add up to 1
    a/1.jpg,17,0.25,0.75,pneumonia                   group and label are empty where they are not known

    key,group,p:edema,p:effusion,label:edema,label:effusion       several labels at once: each by itself
    a/1.jpg,17,0.25,0.75,1,                          1, 0, or empty (also -1) for unknown

Without label columns where the source has none. CSV in UTF-8, or Parquet of the same columns where the name ends in
.parquet. FILE.about.json beside it says how the predictions came about. Other programs may write such files too:
columns may stand in any order, and others among them are passed over.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.predicting import columns, parquet
from engine.predicting.columns import GROUP, KEY, LABEL, OF_LABEL, PROBABILITY, Columns, is_parquet
from engine.whole import system_speaks, whole, write_json
from loaders.errors import UserError, check_regular, reading, unknown
from loaders.sources.classes import check_known

_ROUNDED = 0.01
"""How far a probability may be off that another program cut off after two digits."""


@dataclass(frozen=True)
class Predictions:
    """What networks say of n images about k classes or labels, and what is known of them."""

    keys: list[str]
    """Name of each image within its source."""
    groups: list[str]
    """Patient or the like of each image; empty for none."""
    names: tuple[str, ...]
    """Of the k classes or labels."""
    probabilities: np.ndarray
    """(n, k) float64 in 0..1."""
    labels: np.ndarray | None
    """(n,) int64 class numbers, -1 for unknown; of several labels at once (n, k) float64 of 0, 1, NaN for unknown; None
    where there are none."""
    many: bool
    """Whether an image has several labels at once: then probabilities are independent, else they add up to 1."""

    def __len__(self) -> int:
        return len(self.keys)


def about_path(path: Path) -> Path:
    """Where it is said how a file of predictions came about."""
    return path.with_name(f"{path.name}.about.json")


def read(path: str | Path) -> Predictions:
    """The predictions in a file. UserError, with file, line and column, for what is none."""
    return _checked(columns.load(Path(path)), Path(path))


def write(path: str | Path, predictions: Predictions, about: Mapping[str, Any]) -> None:
    """Write a file of predictions, whole, and what is said about it beside. OSError where it cannot be written."""
    labelled = predictions.labels is not None
    with writing(Path(path), predictions.names, many=predictions.many, labelled=labelled, about=about) as add:
        add(predictions)


@contextmanager
def writing(
    path: Path, names: Sequence[str], *, many: bool, labelled: bool, about: Mapping[str, Any]
) -> Iterator[Callable[[Predictions], None]]:
    """A function that appends to a file, which gets its name when the block ends well; `about` may be filled till then.

    OSError where the file cannot be written.
    """
    of_labels = [f"{OF_LABEL}{name}" for name in names] if many else [LABEL]
    header = [KEY, GROUP, *(f"{PROBABILITY}{name}" for name in names), *(of_labels if labelled else [])]
    with whole(path) as temporary:
        if is_parquet(path):
            kinds = [str, str, *([float] * len(names)), *([float if many else str] * len(of_labels) * labelled)]
            with system_speaks(temporary), parquet.writing(temporary, dict(zip(header, kinds, strict=True))) as add:
                yield lambda part: add([part.keys, part.groups, *part.probabilities.T, *_as_columns(part)])
        else:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                table = csv.writer(file, lineterminator="\n")
                table.writerow(header)
                yield lambda part: table.writerows(_as_rows(part))
        about_path(path).unlink(missing_ok=True)  # what is said of an earlier file of this name
    write_json(about_path(path), {"kind": "predictions", "several_labels": many, "names": list(names)} | dict(about))


def _as_columns(part: Predictions) -> list[Any]:
    if part.labels is None:
        return []
    return list(part.labels.T) if part.many else [_named(part)]


def _as_rows(part: Predictions) -> Iterator[list[Any]]:
    labels: list[list[Any]] = [[]] * len(part)
    if part.labels is not None and part.many:
        labels = [["" if np.isnan(value) else int(value) for value in row] for row in part.labels]
    elif part.labels is not None:
        labels = [[name] for name in _named(part)]
    for key, group, row, label in zip(part.keys, part.groups, part.probabilities.tolist(), labels, strict=True):
        yield [key, group, *row, *label]  # floats by their repr, which reads back the same


def _named(part: Predictions) -> list[str]:
    return ["" if label < 0 else part.names[label] for label in np.asarray(part.labels).tolist()]


def _checked(found: Columns, path: Path) -> Predictions:
    """UserError unless keys are there, once each, probabilities are such, and labels are known."""
    at = found.at
    names = tuple(found.header[i][len(PROBABILITY) :] for i in at.probabilities)
    if not found.keys:
        raise UserError(f"{path} has no rows")
    first: dict[str, int] = {}
    for row, key in enumerate(found.keys):
        if not key:
            raise UserError(f"{path}, {found.where(row)}, column {KEY}: it is empty")
        if first.setdefault(key, row) != row:
            raise UserError(
                f"{path}, {found.where(row)}, column {KEY}: {key!r} is there twice, first in {found.where(first[key])}"
            )
    inside = (found.probabilities >= 0) & (found.probabilities <= 1)  # false for NaN
    if not inside.all():
        row, column = (int(place) for place in np.argwhere(~inside)[0])
        raise UserError(
            f"{path}, {found.where(row)}, column {PROBABILITY}{names[column]}: {found.probabilities[row, column]!s} is "
            "no probability; expected 0 to 1"
        )
    many = _are_many(found, path)
    if not many:
        _check_sums(found, path)
    labels = None
    if many and at.labels:
        labels = np.full(found.probabilities.shape, np.nan)
        for i, cells in zip(at.labels, found.labels, strict=True):
            name = found.header[i]
            labels[:, names.index(name[len(OF_LABEL) :])] = _zeros_and_ones(cells, name, found.where, path)
    elif at.labels:
        labels = _class_numbers(found.labels[0], names, found.where, path)
    return Predictions(found.keys, found.groups, names, found.probabilities, labels, many)


def _are_many(found: Columns, path: Path) -> bool:
    """Whether images have several labels at once: by the label columns, else by what is said beside the file, else by
    whether the probabilities of each row add up to 1."""
    if found.at.labels:
        return found.header[found.at.labels[0]] != LABEL
    said = about_of(path).get("several_labels")
    return said if isinstance(said, bool) else not np.allclose(found.probabilities.sum(1), 1, atol=1e-4)


def about_of(path: str | Path) -> dict[str, Any]:
    """What is said beside a file of predictions; empty where nothing is. UserError where it cannot be read."""
    place = about_path(Path(path))
    if not place.exists():
        return {}
    check_regular(place)
    with reading(place, "JSON"):
        said = json.loads(place.read_text(encoding="utf-8"))
    if not isinstance(said, dict):
        raise UserError(f"{place} holds no object in braces; take it away, or predict again")
    return said


def _check_sums(found: Columns, path: Path) -> None:
    sums = found.probabilities.sum(1)
    off = np.abs(sums - 1) > max(1e-4, _ROUNDED * found.probabilities.shape[1])
    if off.any():
        row = int(off.argmax())
        raise UserError(
            f"{path}, {found.where(row)}: the probabilities add up to {sums[row]:.4g}, but those of one class per image"
            f" to 1; name labels that can be there at once {OF_LABEL}NAME, 1 or 0, in place of {LABEL}"
        )


def _class_numbers(cells: list[str], names: tuple[str, ...], where: Callable[[int], str], path: Path) -> np.ndarray:
    place = {"": -1} | {name: i for i, name in enumerate(names)}
    for row, cell in enumerate(cells):
        if cell not in place:
            raise UserError(f"{path}, {where(row)}, column {LABEL}: {unknown('class', cell, names)}")
    return np.array([place[cell] for cell in cells], dtype=np.int64)


def _zeros_and_ones(cells: list[str], column: str, where: Callable[[int], str], path: Path) -> np.ndarray:
    values = np.empty(len(cells))
    for row, cell in enumerate(cells):
        try:
            values[row] = check_known(cell)
        except ValueError as error:
            raise UserError(f"{path}, {where(row)}, column {column}: {error}") from error
    return values
