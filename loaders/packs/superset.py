"""Several packs read as one: their labels are matched by name, and those that all have are kept.

The supersets of X-rays of arXiv 2106.00116 (section 3.1.2) are made so: CheXpert and MIMIC-CXR share 13 labels, with
NIH 7 are left, and with PadChest the same 7.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from loaders.errors import UserError, shorten


class Labelled(Protocol):
    """What is matched: a file of a pack."""

    path: Path
    attributes: dict
    class_names: list[str]
    labels: np.ndarray  # (n,) int64 classes, or (n, L) float32 with NaN for unknown


def check_files(path: object) -> None:
    """UserError unless `path` is a list of files."""
    if not isinstance(path, Sequence) or not all(isinstance(each, str | Path) for each in path):
        raise UserError(f"{path!r} is no pack; expected a file, or a list of files: [a.h5,b.h5]")


def check_distinct(parts: Sequence[Labelled]) -> None:
    """UserError where two parts are the same file."""
    seen: set[Path] = set()
    for file in (part.path.resolve() for part in parts):
        if file in seen:
            raise UserError(f"{file} is named twice; its images would count twice. Name each pack once")
        seen.add(file)


def common_labels(parts: Sequence[Labelled]) -> list[str]:
    """The labels that all parts have, sorted, so that the order of the parts does not matter.

    Parts with the same labels in the same order keep theirs. UserError: nothing in common, classes that differ, or
    label vectors beside single classes.
    """
    first = parts[0]
    common = set(first.class_names)
    for part in parts[1:]:
        if part.labels.ndim != first.labels.ndim:
            single, vector = (first, part) if first.labels.ndim == 1 else (part, first)
            raise UserError(
                f"{single.path} has one class per image and {vector.path} label vectors; they cannot be read as one"
            )
        if part.labels.ndim == 1 and part.class_names != first.class_names:
            raise UserError(f"{first.path} and {part.path} cannot be read as one: their class names differ")
        common &= set(part.class_names)
        if not common:
            raise UserError(
                f"{part.path} has no label in common with the packs before it: it has {shorten(part.class_names)}, and "
                f"{first.path} {shorten(first.class_names)}; labels are matched by name"
            )
    same = all(part.class_names == first.class_names for part in parts)
    return list(first.class_names) if same else sorted(common)


def columns(part: Labelled, names: Sequence[str]) -> slice | list[int]:
    """Where the labels `names` stand in a part. UserError where it lacks one."""
    if list(names) == part.class_names:
        return slice(None)
    if part.labels.ndim == 1:
        raise UserError(f"{part.path} has one class per image; it cannot be read with the labels {shorten(names)}")
    missing = [name for name in names if name not in part.class_names]
    if missing:
        raise UserError(
            f"{part.path} lacks the labels {shorten(missing)}; it has {shorten(part.class_names)}, matched by name"
        )
    return [part.class_names.index(name) for name in names]


def parts(files: Sequence[Labelled]) -> list[tuple[str, int, int]]:
    """Name of each pack that the files are of, its first record, and the one after its last, counted over all."""
    found: dict[str, tuple[str, int, int]] = {}
    first = 0
    for file in files:
        key = file.attributes.get("set", str(file.path))
        begin = found[key][1] if key in found else first
        first += len(file.labels)
        found[key] = (re.sub(r"-\d{5}-of-\d{5}$", "", file.path.stem), begin, first)
    return list(found.values())


def counts(labels: np.ndarray, names: Sequence[str], spans: Sequence[tuple[str, int, int]]) -> str:
    """A table for people: of each label, how many images have it, and how many are known to have it or not, per part.

    labels: (n, L) float32, NaN for unknown; spans: name, first row and the row after the last of each part.
    """
    spans = [*spans, ("together", 0, len(labels))] if len(spans) > 1 else list(spans)
    rows = [["positive of known", *(f"{name} ({stop - start:,})" for name, start, stop in spans)]]
    for k, label in enumerate(names):
        cells = [labels[start:stop, k] for _, start, stop in spans]
        rows.append([label, *(f"{np.nansum(cell > 0.5):,} of {np.sum(~np.isnan(cell)):,}" for cell in cells)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(lines)
