"""A table of images: a CSV file with a column of paths and a column of labels."""

import csv
from collections.abc import Sequence
from pathlib import Path

from loaders.errors import UserError
from loaders.sources.classes import with_classes
from loaders.sources.listing import Listing, TableBuilder, file_range

KIND = "csv"
HELP = "a .csv or .tsv file with columns path and label [group, split]; --under takes the rows of one split"
_COLUMNS = {
    "path": ("path", "image", "file", "filename", "image_path", "filepath"),
    "label": ("label", "class", "target", "class_name"),
    "group": ("group", "patient", "patient_id", "patientid"),
    "split": ("split", "part", "set"),
}
_NEEDED = ("path", "label")


def accepts(source: str) -> bool:
    return Path(source).suffix.lower() in (".csv", ".tsv") and Path(source).is_file()


def listing(source: str, under: str | None = None) -> Listing:
    path = Path(source)
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
            return _read(rows, column, path, under)
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


def _read(rows: csv.DictReader, column: dict[str, str], path: Path, under: str | None) -> Listing:
    builder = TableBuilder(file_range)
    labels: dict[str, int] = {}
    groups: dict[str, int] = {}
    splits: set[str] = set()
    for row in rows:
        name, label = ((row[column[meaning]] or "").strip() for meaning in _NEEDED)
        if not name or not label:
            raise UserError(f"{path}, line {rows.line_num}: the path or the label is empty")
        split = (row[column["split"]] or "").strip() if "split" in column else ""
        splits.add(split)
        if under and split != under:
            continue
        group = (row[column["group"]] or "").strip() if "group" in column else ""
        builder.add(
            name,
            labels.setdefault(label, len(labels)),
            str(path.parent / name),
            group=groups.setdefault(group, len(groups)) if group else -1,
        )
    if not len(builder):
        raise UserError(f"{path} has no rows" + (f" of {under!r}; it has {', '.join(sorted(splits))}" if under else ""))
    numbers = all(label.isdecimal() for label in labels)
    return Listing(*with_classes(builder.table(), [int(label) if numbers else label for label in labels], str(path)))
