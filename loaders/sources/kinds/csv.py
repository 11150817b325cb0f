"""A table of images: a CSV file with a column of paths and a column of labels."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from loaders.errors import UserError, unknown
from loaders.sources.classes import as_meant, check_class_numbers, check_label, with_classes
from loaders.sources.listing import Listing, Table, TableBuilder, file_range

KIND = "csv"
HELP = "a .csv or .tsv file with columns path and label [group, split]; --under takes the rows of one split"
_COLUMNS = {
    "path": ("path", "image", "file", "filename", "image_path", "filepath"),
    "label": ("label", "class", "target", "class_name"),
    "group": ("group", "patient", "patient_id", "patientid"),
    "split": ("split", "part", "set"),
}
_NEEDED = ("path", "label")
SETTINGS = {"unlabelled": "rows whose label is missing or negative: error (default); skip; unknown: a class, the last"}
_UNKNOWN = "\0unknown"  # no label that a table can have: the class of rows without one
_UNLABELLED = ("error", "skip", "unknown")


def accepts(source: str) -> bool:
    return Path(source).suffix.lower() in (".csv", ".tsv") and Path(source).is_file()


def listing(source: str, under: str | None = None, settings: Mapping[str, str] | None = None) -> Listing:
    path = Path(source)
    unlabelled = (settings or {}).get("unlabelled", _UNLABELLED[0])
    if unlabelled not in _UNLABELLED:
        raise unknown("value of --set unlabelled", unlabelled, _UNLABELLED)
    if not path.is_file():
        raise UserError(f"there is no table at {source}")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            column = _columns(rows.fieldnames or (), path)
            if under and "split" not in column:
                raise UserError(
                    f"{source} has no column {' or '.join(_COLUMNS['split'])}, so --under cannot choose rows"
                )
            return _read(rows, column, path, under, unlabelled)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{source} cannot be read as a table: {error}") from error


def _columns(names: Sequence[str], path: Path) -> dict[str, str]:
    found = {}
    for meaning, known in _COLUMNS.items():
        matching = [name for name in names if name and name.strip().lower() in known]
        if len(matching) > 1:
            raise UserError(f"{path}: the columns {' and '.join(matching)} may both be the {meaning}; rename one")
        if matching:
            found[meaning] = matching[0]
    for meaning in _NEEDED:
        if meaning not in found:
            raise UserError(
                f"{path} has no column for the {meaning}: it has {', '.join(filter(None, names)) or 'none'}; name it"
                f" {' or '.join(_COLUMNS[meaning])}"
            )
    return found


def _read(rows: csv.DictReader, column: dict[str, str], path: Path, under: str | None, unlabelled: str) -> Listing:
    builder = TableBuilder(file_range)
    labels: dict[str, int] = {}
    groups: dict[str, int] = {}
    splits: set[str] = set()
    none: dict[str, str] = {}  # what was typed in place of a label → why it is none
    without: list[str] = []  # images that have none
    for row in rows:
        name, label = ((row[column[meaning]] or "").strip() for meaning in _NEEDED)
        if not name:
            raise UserError(f"{path}, line {rows.line_num}: the path is empty")
        split = (row[column["split"]] or "").strip() if "split" in column else ""
        splits.add(split)
        if under and split != under:
            continue
        if label not in labels and label not in none and (reason := _reason(label)):
            none[label] = reason
        if label in none:
            if unlabelled == "error":
                raise UserError(
                    f"{path}, line {rows.line_num}: {none[label]}; --set unlabelled=skip leaves such rows out,"
                    " unlabelled=unknown makes them a class"
                )
            without.append(name)
            if unlabelled == "skip":
                continue
            label = _UNKNOWN
        group = (row[column["group"]] or "").strip() if "group" in column else ""
        builder.add(
            name,
            labels.setdefault(label, len(labels)),
            str(path.parent / name),
            group=groups.setdefault(group, len(groups)) if group else -1,
        )
    if not len(builder):
        raise UserError(
            f"{path} has no rows" + (f" of {under!r}; it has {', '.join(sorted(splits))}" if under else " with labels")
        )
    table, names = _numbered(builder.table(), list(labels), str(path))
    done = "left out" if unlabelled == "skip" else "of the class unknown"
    notes = (f"{len(without):,} rows without a label are {done}, such as {without[0]}",) if without else ()
    return Listing(table, names, notes=notes)


def _reason(label: str) -> str:
    """Why it is no label; empty if it is one."""
    try:
        check_label(label)
    except ValueError as error:
        return str(error)
    return ""


def _numbered(table: Table, labels: list[str], source: str) -> tuple[Table, tuple[str, ...]]:
    """The table with class numbers, the class of rows without a label last; and the names of the classes."""
    meant = as_meant([label for label in labels if label != _UNKNOWN], source)
    if len(meant) == len(labels):
        return with_classes(table, meant, source)
    at = labels.index(_UNKNOWN)
    if meant and isinstance(meant[0], int):
        check_class_numbers([number for number in meant if isinstance(number, int)], source)
        numbers = [number for number in meant if isinstance(number, int)]
        table, names = with_classes(table, [*numbers[:at], max(numbers) + 1, *numbers[at:]], source)
        return table, (*names[:-1], "unknown")
    known = sorted({str(name) for name in meant} - {"unknown"})
    place = {name: number for number, name in enumerate((*known, "unknown"))}
    rank = np.array([place["unknown" if label == _UNKNOWN else label] for label in labels])
    return table.take(slice(None), rank[table.labels]), tuple(place)
