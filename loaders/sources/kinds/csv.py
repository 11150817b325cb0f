"""A table of images: a CSV file with a column of paths and a column of labels."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from loaders.errors import UserError, shorten, unknown
from loaders.sources.classes import as_meant, check_class_numbers, check_known, check_label, with_classes
from loaders.sources.listing import UNKNOWN, Listing, Table, TableBuilder, file_range
from loaders.sources.names import as_text

KIND = "csv"
HELP = (
    "a .csv or .tsv file with columns path and label, or label:NAME of several labels at once [group, split]; --under"
    " takes the rows of one split"
)
_COLUMNS = {
    "path": ("path", "image", "file", "filename", "image_path", "filepath"),
    "label": ("label", "class", "target", "class_name"),
    "group": ("group", "patient", "patient_id", "patientid"),
    "split": ("split", "part", "set"),
}
_OF_LABEL = "label:"
SETTINGS = {
    "labels": "A,B,…: columns of labels that an image may have at once: 1, 0, nothing (also -1) for unknown; none: no"
    " label",
    "unlabelled": "rows whose label is missing or negative: error (default); skip; unknown: a class, the last; keep:"
    " without a label, to predict on",
}
_UNKNOWN = "\0unknown"  # no label that a table can have: the class of rows without one
_UNLABELLED = ("error", "skip", "unknown", "keep")


def accepts(source: str) -> bool:
    return Path(source).suffix.lower() in (".csv", ".tsv") and Path(source).is_file()


def listing(source: str, under: str | None = None, settings: Mapping[str, str] | None = None) -> Listing:
    path, settings = Path(source), settings or {}
    unlabelled = settings.get("unlabelled", _UNLABELLED[0])
    if unlabelled not in _UNLABELLED:
        raise unknown("value of --set unlabelled", unlabelled, _UNLABELLED)
    if not path.is_file():
        raise UserError(f"there is no table at {source}")
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            header = rows.fieldnames or ()
            several = _several(header, path, settings.get("labels"))
            column = _columns(header, path, single=several is None)
            if under and "split" not in column:
                raise UserError(
                    f"{source} has no column {' or '.join(_COLUMNS['split'])}, so --under cannot choose rows"
                )
            if several is None:
                return _read(rows, column, path, under, unlabelled)
            return _read_several(rows, column, several, path, under)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{source} cannot be read as a table: {error}") from error


def _several(header: Sequence[str], path: Path, wanted: str | None) -> dict[str, str] | None:
    """Name → column of labels that an image may have at once; empty where it is to have none; None: one class."""
    own = {name.strip().removeprefix(_OF_LABEL): name for name in header if name and name.strip().startswith(_OF_LABEL)}
    if wanted is None:
        return own or None
    if wanted == "none":
        return {}
    there = {name.strip(): name for name in header if name} | own
    chosen = {}
    for name in (word.strip() for word in wanted.split(",")):
        if name not in there:
            raise UserError(f"{path}: {unknown('column', name, there)}")
        if name in chosen:
            raise UserError(f"--set labels names {name!r} twice")
        chosen[name] = there[name]
    return chosen


def _columns(names: Sequence[str], path: Path, single: bool) -> dict[str, str]:
    found = {}
    for meaning, known in _COLUMNS.items():
        matching = [name for name in names if name and name.strip().lower() in known]
        if meaning == "label" and not single:
            continue
        if len(matching) > 1:
            raise UserError(f"{path}: the columns {' and '.join(matching)} may both be the {meaning}; rename one")
        if matching:
            found[meaning] = matching[0]
    for meaning in ("path", "label") if single else ("path",):
        if meaning not in found:
            raise UserError(
                f"{path} has no column for the {meaning}: it has {', '.join(filter(None, names)) or 'none'}; name it"
                f" {' or '.join(_COLUMNS[meaning])}"
                + ("; or give --set labels=A,B,… of labels at once, or labels=none" if meaning == "label" else "")
            )
    return found


def _rows(
    rows: csv.DictReader, column: dict[str, str], path: Path, under: str | None
) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Path, group and all cells of each row that is to be taken. UserError where there is none."""
    splits: set[str] = set()
    taken = 0
    for row in rows:
        if None in row:  # a comma in a path that is not in quotes would make the rest of it a label
            raise UserError(
                f"{path}, line {rows.line_num}: {len(row) - 1 + len(row[None]):,} values, but the first line names"
                f" {len(row) - 1:,}; put values with a comma in quotes"
            )
        name, group, split = ((row[column[what]] or "").strip() if what in column else "" for what in
                              ("path", "group", "split"))  # fmt: skip
        if not name:
            raise UserError(f"{path}, line {rows.line_num}: the path is empty")
        splits.add(split := as_text(split))
        if not under or split == under:
            taken += 1
            yield name, group, row
    if not taken:
        raise UserError(f"{path} has no rows" + (f" of {under!r}; it has {', '.join(sorted(splits))}" if under else ""))


class _Builder:
    """Collects the rows of a table."""

    def __init__(self, path: Path):
        self._folder, self._rows, self._groups = path.parent, TableBuilder(file_range), {"": -1}

    def add(self, name: str, group: str, label: int | tuple[float, ...]) -> None:
        number = self._groups.setdefault(group, len(self._groups) - 1)
        self._rows.add(as_text(name), label, str(self._folder / name), group=number)

    def table(self) -> Table:
        return self._rows.table()


def _read(rows: csv.DictReader, column: dict[str, str], path: Path, under: str | None, unlabelled: str) -> Listing:
    builder = _Builder(path)
    labels: dict[str, int] = {}
    none: dict[str, str] = {}  # what was typed in place of a label → why it is none
    without: list[str] = []  # images that have none
    for name, group, row in _rows(rows, column, path, under):
        label = (row[column["label"]] or "").strip()
        if label not in labels and label not in none and (reason := _reason(label)):
            none[label] = reason
        if label in none:
            if unlabelled == "error":
                raise UserError(
                    f"{path}, line {rows.line_num}: {none[label]}; --set unlabelled=skip leaves such rows out,"
                    " unlabelled=unknown makes them a class, unlabelled=keep takes them without a label"
                )
            without.append(name)
            if unlabelled == "skip":
                continue
            label = _UNKNOWN
        if label == _UNKNOWN and unlabelled == "keep":
            builder.add(name, group, UNKNOWN)
        else:
            builder.add(name, group, labels.setdefault(label, len(labels)))
    table = builder.table()
    if not len(table):
        raise UserError(f"{path} has no rows with labels")
    table, names = _numbered(table, list(labels), str(path)) if labels else (table, ())
    done = {"skip": "left out", "unknown": "of the class unknown", "keep": "taken without"}.get(unlabelled)
    notes = (f"{len(without):,} rows without a label are {done}, such as {without[0]}",) if without else ()
    return Listing(table, names, notes=notes)


def _read_several(
    rows: csv.DictReader, column: dict[str, str], several: dict[str, str], path: Path, under: str | None
) -> Listing:
    """Label vectors, or no labels where `several` names none."""
    builder = _Builder(path)
    for name, group, row in _rows(rows, column, path, under):
        builder.add(name, group, tuple(_known(row, rows, several, path)) or UNKNOWN)
    table = builder.table()
    notes: tuple[str, ...] = ()
    if several:
        counts = zip(several, (table.labels > 0.5).sum(0), (~np.isnan(table.labels)).sum(0), strict=True)
        listed = [f"{name} ({positive:,} of {known:,})" for name, positive, known in counts]
        notes = (f"{len(several)} labels, positive of known: {shorten(listed)}",)
    return Listing(table, tuple(several), notes=notes)


def _known(row: dict[str, str], rows: csv.DictReader, several: dict[str, str], path: Path) -> Iterator[float]:
    for name, column in several.items():
        try:
            yield check_known(row[column] or "")
        except ValueError as error:
            raise UserError(f"{path}, line {rows.line_num}, column {name}: {error}") from error


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
