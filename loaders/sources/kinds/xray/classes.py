"""X-ray sets with one class per image, known from file names or lists beside the images: Tuberculosis and COVIDx."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loaders.errors import UserError
from loaders.sources.kinds.xray.files import locate, names_in
from loaders.sources.kinds.xray.labels import patient_numbers
from loaders.sources.kinds.xray.splits import shuffled_first
from loaders.sources.listing import Listing, TableBuilder, file_below, file_in_folder
from loaders.sources.names import as_text

# The two sets of the US National Library of Medicine: how file names begin, where they may lie, how many there are.
_TB_SETS = {
    "Shenzhen": ("CHNCXR_", ("ChinaSet_AllFiles/CXR_png", "CXR_png"), 662),
    "Montgomery": ("MCUCXR_", ("MontgomerySet/CXR_png", "NLM-MontgomeryCXRSet/MontgomerySet/CXR_png", "CXR_png"), 138),
}
_TB_CLASSES = ("normal", "tuberculosis")
_TB_TRAIN = 0.85
_COVIDX_SIDES = ("train", "test")


def tuberculosis(folder: Path, side: str | None) -> Listing:
    """Both sets, or the one that is there; class 1 where the digit before `.png` is 1.

    The published split, of each set by itself: names sorted, shuffled, the first 85% for training. Each image is a
    patient, so none is on both sides.
    """
    builder, notes, found = TableBuilder(file_in_folder), [], 0
    for name, (prefix, places, published) in _TB_SETS.items():
        place, files = _tb_images(folder, places, prefix)
        found += len(files)
        if not files:
            notes.append(f"there are no images of {name}")
        elif len(files) != published:
            notes.append(f"{name} has {len(files):,} images here, {published:,} as published: it is split otherwise")
        train = shuffled_first(len(files), _TB_TRAIN).tolist()
        for file, in_train in zip(files, train, strict=True):
            if side is None or in_train == (side == "train"):
                builder.add(as_text(f"{name}/{file}"), int(file[-5]), str(place))
    if not found:
        looked = [f"{place}/{prefix}*.png" for prefix, places, _ in _TB_SETS.values() for place in places]
        raise UserError(f"{folder} holds none of the tuberculosis images: looked for {', '.join(looked)}")
    return Listing(builder.table(), _TB_CLASSES, notes=tuple(notes))


def _tb_images(folder: Path, places: Sequence[str], prefix: str) -> tuple[Path, list[str]]:
    """The first of the places that holds images of this set, and their sorted names."""
    for place in places:
        files = sorted(name for name in names_in(folder / place) if name.startswith(prefix) and name.endswith(".png"))
        wrong = [name for name in files if not re.search(r"_[01]\.png$", name)]
        if wrong:
            raise UserError(f"{folder / place / wrong[0]}: expected a name that ends in _0.png or _1.png, its class")
        if files:
            return folder / place, files
    return folder, []


def covidx(folder: Path, side: str | None, skip: bool) -> Listing:
    """The images of train.txt and test.txt, or of one of them. `skip`: leave those out that are missing."""
    rows = {part: _covidx_rows(folder / f"{part}.txt") for part in _COVIDX_SIDES}
    names = tuple(sorted({label for part in rows.values() for _, _, label in part}))
    chosen = [(f"{part}/{file}", *row) for part in rows if side in (None, part) for file, *row in rows[part]]
    files, patients, labels = zip(*chosen, strict=True)
    paths, notes = locate("covidx", folder, files, skip)
    builder = TableBuilder(file_below)
    for path, label, group in zip(paths, labels, patient_numbers(np.array(patients)).tolist(), strict=True):
        if path:
            builder.add(as_text(path), names.index(label), str(folder), group=group)
    return Listing(builder.table(), tuple(map(as_text, names)), notes=notes)


def _covidx_rows(path: Path) -> list[tuple[str, str, str]]:
    """File, patient and label of each line: PATIENT PATH LABEL SOURCE.

    A patient may have spaces in it ("COVID 1 COVID(1).png positive sirm", in 943 of 15,952 lines of version 8), and so
    may a path. Of several readings the shortest path that is there counts; the last word where none is.
    """
    if not path.is_file():
        raise UserError(
            f"there is no {path}; COVIDx is a folder of train.txt, test.txt, train/ and test/ (of version 8 "
            f"rename its list {path.stem}_COVIDx8B.txt)"
        )
    there = names_in(path.with_suffix(""))
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), 1):
        words = line.split()
        if len(words) >= 4:
            readings = [" ".join(words[k:-2]) for k in range(len(words) - 3, 0, -1)]
            file = next((name for name in readings if name in there), readings[0])
            rows.append((file, " ".join(words[: len(words) - 2 - len(file.split())]), words[-2]))
        elif words:
            raise UserError(f"{path}, line {number}: expected PATIENT PATH LABEL SOURCE, found {line!r}")
    if not rows:
        raise UserError(f"{path} is empty")
    return rows
