"""Labels from a table beside the images: one class, or several labels at once, joined by path or SOP Instance UID."""

import csv
import os
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path

from loaders.errors import UserError, unknown
from loaders.sources.classes import check_known, check_label

Label = str | tuple[float, ...]
"""A class as typed, or a number for each label: 1, 0, NaN for unknown."""
_PATH = ("path", "image", "file", "filename", "image_path", "filepath")
_UID = ("sopinstanceuid", "sop_instance_uid", "sop instance uid", "uid", "image_id", "imageid")
_CLASS = ("label", "class", "target", "class_name")
_OTHER = ("group", "patient", "patient_id", "patientid", "split", "part", "set", "study", "studyinstanceuid")
_OF_LABEL = "label:"


class Labels:
    """What a table says, by path within the source and by SOP Instance UID."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        """Of the labels that an image may have at once; empty where it has one class."""
        self.unused: set[int] = set()
        """Lines of the table with a label that no image was given."""
        self._of: dict[tuple[str, str], tuple[int, Label]] = {}

    def add(self, what: str, name: str, line: int, label: Label) -> Label:
        """The label that this path or UID has now: that of the first line with it."""
        self.unused.add(line)
        return self._of.setdefault((what, name), (line, label))[1]

    def of(self, path: str, instance: str) -> Label | None:
        """The label of a file: by its path, else by its SOP Instance UID. None where the table has none."""
        found = self._of.get(("path", path)) or self._of.get(("uid", instance))
        if found is None:
            return None
        self.unused.discard(found[0])
        return found[1]


def read_labels(path: Path, root: Path, columns: str | None = None) -> Labels:
    """The labels of a .csv or .tsv file whose paths are absolute or within `root`; `columns`: those of labels, A,B,….

    Rows whose class is missing, empty or negative have no label. UserError for a table that has no column of paths or
    UIDs, none of labels, values that are no labels, or two labels for one image.
    """
    if not path.is_file():
        raise UserError(f"there is no table at {path} (--set labels)")
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            table = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            header = [name for name in table.fieldnames or () if name]
            rows = [(table.line_num, row) for row in table]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a table: {error}") from error
    ids = {"path": _column(header, _PATH, path, "path"), "uid": _column(header, _UID, path, "SOP Instance UID")}
    if not any(ids.values()):
        raise UserError(
            f"{path} has no column that says which image is meant: it has {', '.join(header) or 'none'}; name it path"
            " or SOPInstanceUID"
        )
    several, single = _label_columns(header, ids, path, columns)
    found = Labels(tuple(several))
    for line, row in rows:
        if None in row:
            raise UserError(f"{path}, line {line}: more values than the first line names; put commas in quotes")
        label = _label(row, several, single, f"{path}, line {line}")
        names = {what: (row[column] or "").strip() for what, column in ids.items() if column}
        if not any(names.values()):
            raise UserError(f"{path}, line {line}: neither a path nor a UID")
        for what, name in names.items():
            if name and label is not None:
                name = _within(name, root) if what == "path" else name
                if not _same(found.add(what, name, line, label), label):
                    raise UserError(f"{path}, line {line}: {name} has another label in a line before")
    return found


def _column(header: Sequence[str], known: Sequence[str], path: Path, what: str) -> str | None:
    matching = [name for name in header if name.strip().lower() in known]
    if len(matching) > 1:
        raise UserError(f"{path}: the columns {' and '.join(matching)} may both be the {what}; rename one")
    return matching[0] if matching else None


def _label_columns(
    header: Sequence[str], ids: Mapping[str, str | None], path: Path, wanted: str | None
) -> tuple[dict[str, str], str]:
    """Name → column of labels that an image may have at once, or the column of its class."""
    marked = {name.strip().removeprefix(_OF_LABEL): name for name in header if name.strip().startswith(_OF_LABEL)}
    if wanted is not None:
        there = {name.strip(): name for name in header} | marked
        names = [name.strip() for name in wanted.split(",")]
        for name in names:
            if name not in there:
                raise UserError(f"{path}: {unknown('column', name, there)} (--set columns)")
        if len(set(names)) < len(names):
            raise UserError(f"--set columns={wanted} names a column twice")
        return {name: there[name] for name in names}, ""
    if marked:
        return marked, ""
    single = _column(header, _CLASS, path, "label")
    if single:
        return {}, single
    other = {name.strip(): name for name in header if name not in ids.values() and name.strip().lower() not in _OTHER}
    if not other:
        raise UserError(f"{path} has no column of labels: it has {', '.join(header)}; name it label, or label:NAME")
    return other, ""


def _label(row: Mapping[str, str], several: Mapping[str, str], single: str, place: str) -> Label | None:
    if single:
        try:
            return str(check_label(row[single] or ""))
        except ValueError:
            return None
    values = []
    for name, column in several.items():
        try:
            values.append(check_known(row[column] or ""))
        except ValueError as error:
            told = f"{place}, column {name}: {error}; --set columns=A,B,… names the columns of labels"
            raise UserError(told) from error
    return tuple(values)


def _within(name: str, root: Path) -> str:
    """A path of the table as one within the source."""
    if os.path.isabs(name):
        name = os.path.relpath(name, os.path.abspath(root))
    return posixpath.normpath(name)


def _same(one: Label, other: Label) -> bool:
    return repr(one) == repr(other)  # NaN is NaN
