"""Chest X-rays: the sets of the paper, with labels as torchxrayvision reads them, and their splits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loaders.arguments import expanded
from loaders.errors import UserError, unknown
from loaders.sources.kinds.xray.classes import covidx, tuberculosis
from loaders.sources.kinds.xray.files import locate
from loaders.sources.kinds.xray.labels import Labels, patient_numbers, read_labels
from loaders.sources.kinds.xray.splits import SPLITS, check_side, find_table, side_of_split
from loaders.sources.listing import Listing, TableBuilder, file_below
from loaders.sources.names import as_text

KIND = "xray"
NAMES = ("chexpert", "mimic", "nih", "padchest", "padchest-cl", "tuberculosis", "covidx")
HELP = f"xray:NAME:FOLDER, NAME one of {', '.join(NAMES)}; --under train or test takes a side of a split"
SETTINGS = {
    "views": "projections, such as PA,AP (default: PA,AP; of PadChest PA,AP,AP Supine,L,COSTAL)",
    "unique_patients": "true: only the first image of each patient (default: false)",
    "split": "what --under takes a side of: patients (a tenth of them is test) or published (default: patients)",
    "no_finding": "of chexpert, mimic: what it makes 0: findings, or all labels, devices too (default: findings)",
    "missing": "skip: leave out images that are not there (default: error)",
    "labels": "your own label file (default: the one in FOLDER, or the one that torchxrayvision ships)",
}
_VIEWS = ("PA", "AP")
_PADCHEST_VIEWS = ("PA", "AP", "AP Supine", "L", "COSTAL")
_CLASSES = {"tuberculosis": (), "covidx": ("missing",)}  # sets with one class per image, and their settings
_WITH_DEVICES = ("chexpert", "mimic")  # a row may say both No Finding and Support Devices
_MIMIC_LABELS, _MIMIC_IMAGES = "mimic-cxr-2.0.0-chexpert.csv", "mimic-cxr-2.0.0-metadata.csv"


@dataclass(frozen=True)
class _Choice:
    """The settings, checked."""

    views: tuple[str, ...]
    """Projections; empty: the set's own."""
    unique_patients: bool
    """Only the first image of each patient."""
    split: str
    """Of SPLITS."""
    clear_devices: bool
    """Support Devices, too, are 0 where there is no finding."""
    skip: bool
    """Leave out images that are missing."""
    labels: Path | None
    """Label file of one's own."""


def accepts(source: str) -> bool:
    return source.startswith(f"{KIND}:")


def listing(source: str, under: str | None = None, settings: Mapping[str, str] | None = None) -> Listing:
    name, folder = _parse(source)
    settings = settings or {}
    choice = _choice(settings)
    if name not in _CLASSES:
        return _labelled(name, folder, under, choice)
    for key, value in settings.items():
        if key not in _CLASSES[name] and (key, value) != ("split", "published"):
            its = ", ".join(("split=published", *_CLASSES[name]))
            raise UserError(
                f"--set {key}={value} is not for {name}, which has one label per image and one split; {its} is"
            )
    if under not in (None, "train", "test"):
        raise unknown(f"side of the split of {name} (--under)", under, ("train", "test"))
    return tuberculosis(folder, under) if name == "tuberculosis" else covidx(folder, under, choice.skip)


def _parse(source: str) -> tuple[str, Path]:
    _, _, rest = source.partition(":")
    name, _, place = rest.partition(":")
    if not accepts(source) or not place:
        raise UserError(
            f"{source} is no X-ray source: expected xray:NAME:FOLDER, such as xray:nih:data/nih;"
            f" NAME is one of {', '.join(NAMES)}"
        )
    if name not in NAMES:
        raise unknown("X-ray set", name, NAMES)
    folder = Path(place).expanduser()  # a shell does so only where a word begins
    if not folder.is_dir():
        raise UserError(f"{source}: there is no folder {folder}")
    return name, folder


def _choice(settings: Mapping[str, str]) -> _Choice:
    def one_of(key: str, known: Sequence[str]) -> str:
        value = settings.get(key, known[0])
        if value not in known:
            raise unknown(f"value of --set {key}", value, known)
        return value

    views = tuple(view.strip() for view in settings.get("views", "").split(",") if view.strip())
    if "views" in settings and not views:
        raise UserError("--set views= names no view; such as views=PA,AP is expected")
    return _Choice(
        views,
        one_of("unique_patients", ("false", "true")) == "true",
        one_of("split", SPLITS),
        one_of("no_finding", ("findings", "all")) == "all",
        one_of("missing", ("error", "skip")) == "skip",
        Path(expanded(settings["labels"])) if "labels" in settings else None,
    )


def _labelled(name: str, folder: Path, under: str | None, choice: _Choice) -> Listing:
    one_class = name == "padchest-cl"
    name = "padchest" if one_class else name
    if under:
        check_side(name, choice.split, under)
    if choice.clear_devices and name not in _WITH_DEVICES:
        raise UserError(
            f"--set no_finding=all is for {' and '.join(_WITH_DEVICES)}; {name} has no label that it changes"
        )
    labels = _read(name, folder, under, choice)
    labels = labels.take(_of_views(labels, choice.views, _PADCHEST_VIEWS if name == "padchest" else _VIEWS))
    if choice.unique_patients:
        _, first = np.unique(labels.patients, return_index=True)
        labels = labels.take(np.sort(first))
    notes: tuple[str, ...] = ()
    if under:
        side, notes = side_of_split(name, labels, folder, choice.split, under)
        labels = labels.take(side)
    if one_class:
        labels = labels.take(labels.values.sum(axis=1) == 1)
    if not len(labels):
        raise UserError(f"no image of {name} is left with these settings" + (f" and --under {under}" if under else ""))
    paths, left_out = locate(name, folder, labels.files.tolist(), choice.skip)
    values = labels.values.argmax(axis=1).tolist() if one_class else labels.values
    builder = TableBuilder(file_below)
    for path, value, group in zip(paths, values, patient_numbers(labels.patients).tolist(), strict=True):
        if path:
            builder.add(as_text(path), value, str(folder), group=group)
    return Listing(builder.table(), labels.names, notes=(*notes, *left_out))


def _read(name: str, folder: Path, under: str | None, choice: _Choice) -> Labels:
    """Of the label file that is asked for, that lies in the folder, or that torchxrayvision ships."""
    if name == "mimic":
        labels, images = choice.labels or find_table(folder, _MIMIC_LABELS), find_table(folder, _MIMIC_IMAGES)
        return read_labels(name, folder, labels, images, clear_devices=choice.clear_devices)
    file = choice.labels
    if name == "chexpert":
        side = under if under and choice.split == "published" else "train"
        if file and choice.split == "published":
            raise UserError(
                "the published split of chexpert is train.csv and valid.csv in its folder; leave --set labels away"
            )
        own = folder / f"{side}.csv"
        file = file or (own if own.is_file() or side == "valid" else None)
    return read_labels(name, folder, file, clear_devices=choice.clear_devices)


def _of_views(labels: Labels, wanted: Sequence[str], default: Sequence[str]) -> np.ndarray:
    """(n,) bool: the images of these views."""
    there, count = np.unique(labels.views.astype(str), return_counts=True)
    for view in wanted:
        if view not in there:
            raise unknown("image of view", view, [f"{name} ({n:,})" for name, n in zip(there, count, strict=True)])
    return np.isin(labels.views.astype(str), list(wanted or default))
