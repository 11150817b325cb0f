"""What may be said of how DICOM becomes images: the settings, and their values."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loaders.arguments import expanded
from loaders.errors import UserError, unknown
from loaders.sources.kinds.dicom.identity import read_secret
from loaders.sources.kinds.dicom.values import Window

_FRAMES = ("all", "first")
_UNLABELLED = ("error", "skip", "keep")
_WINDOWS = ("file", "full", "extremes")
SETTINGS = {
    "frames": "of files with several: all (default), each an image; first",
    "window": "what is black and white: file, its VOI LUT or window, else all that it can store (default); full, the"
    " latter; extremes, the least and greatest value of each image; CENTER,WIDTH, such as -600,1500",
    "labels": "a .csv or .tsv file with a column path (within SOURCE) or SOPInstanceUID, and a column label, or columns"
    " of labels: 1, 0, nothing (also -1) for unknown",
    "columns": "A,B,…: which columns of it are labels that an image may have at once",
    "unlabelled": "images that have no label in it: error (default); skip; keep",
    "secret": "a file with the key of the hash, 16 bytes or more: the same patients get the same groups in every pack"
    " (default: a random key for this pack alone)",
    "table": "a .csv file to write: which file has which key and group; keep it as safe as the images",
}
PRIVATE = frozenset(("labels", "secret", "table"))
"""Settings that name files."""


@dataclass(frozen=True)
class Choice:
    """The settings, checked."""

    all_frames: bool
    window: Window
    labels: Path | None
    columns: str | None
    unlabelled: str
    secret: bytes
    kept: bool
    """Whether the secret is of a file, and so the same another time."""
    table: Path | None


def read_choice(settings: Mapping[str, str]) -> Choice:
    """The settings, checked. UserError for values that there are not."""

    def one_of(key: str, known: Sequence[str]) -> str:
        if (value := settings.get(key, known[0])) not in known:
            raise unknown(f"value of --set {key}", value, known)
        return value

    paths = {key: Path(expanded(settings[key])) for key in PRIVATE if key in settings}
    for key in ("columns", "unlabelled"):
        if key in settings and "labels" not in settings:
            raise UserError(f"--set {key}={settings[key]} is for --set labels=FILE, which is not given")
    window = settings.get("window", _WINDOWS[0])
    return Choice(
        one_of("frames", _FRAMES) == "all",
        window if window in _WINDOWS else _numbers(window),
        paths.get("labels"),
        settings.get("columns"),
        one_of("unlabelled", _UNLABELLED),
        read_secret(paths.get("secret")),
        "secret" in paths,
        paths.get("table"),
    )


def _numbers(window: str) -> Window:
    """Centre and width."""
    try:
        center, width = map(float, window.split(","))
    except ValueError:
        raise UserError(f"--set window={window}: expected {', '.join(_WINDOWS)}, or CENTER,WIDTH") from None
    if not (math.isfinite(center) and 1 <= width < math.inf):
        raise UserError(f"--set window={window}: both are to be finite, and the width 1 or more")
    return center, width
