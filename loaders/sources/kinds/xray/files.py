"""Where the images of X-ray sets lie on disk."""

import os
from collections.abc import Sequence
from pathlib import Path

from loaders.errors import UserError, shorten

# Of sets whose label files give names alone: the folders that may hold them.
_FOLDERS = {
    "nih": ("images", "images_*/images", "."),
    "padchest": (".", "[0-9]*", "images", "images/[0-9]*"),
}


def locate(name: str, folder: Path, files: Sequence[str], skip: bool) -> tuple[list[str], tuple[str, ...]]:
    """Path of each file within the folder, "" for the missing ones that are skipped; and a note on how many are.

    Every folder is listed once, in place of asking for each file. UserError if files are missing and `skip` is not
    set, or if all are.
    """
    patterns = _FOLDERS.get(name)
    paths = _by_name(folder, patterns, files) if patterns else _as_they_are(folder, files)
    missing = [file for file, path in zip(files, paths, strict=True) if not path]
    if len(missing) == len(files):
        first = [f"{pattern}/{files[0]}".removeprefix("./") for pattern in patterns or (".",)]
        raise UserError(
            f"{folder} holds none of the {len(files):,} images of {name}: looked for {', '.join(first)} and so on"
        )
    if missing and not skip:
        raise UserError(
            f"{folder} lacks {len(missing):,} of {len(files):,} images of {name}: {shorten(missing)};"
            " download them, or leave them out with --set missing=skip"
        )
    total = f"{len(missing):,} of {len(files):,} images"
    return paths, (f"{total} are missing and left out, such as {missing[0]}",) if missing else ()


def names_in(folder: str | Path) -> set[str]:
    """What a folder holds; nothing where there is none."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _as_they_are(folder: Path, files: Sequence[str]) -> list[str]:
    inside = {parent: names_in(folder / parent) for parent in {file.rpartition("/")[0] for file in files}}
    return [file if file.rpartition("/")[2] in inside[file.rpartition("/")[0]] else "" for file in files]


def _by_name(folder: Path, patterns: Sequence[str], files: Sequence[str]) -> list[str]:
    """Of two files of one name the one of the first pattern counts."""
    found: dict[str, str] = {}
    for pattern in patterns:
        # What has a suffix is an image: in a flat folder these begin with digits, too.
        places = [folder] if pattern == "." else sorted(path for path in folder.glob(pattern) if not path.suffix)
        for place in places:
            inside = "" if place == folder else place.relative_to(folder).as_posix() + "/"
            for file in names_in(place):
                found.setdefault(file, inside + file)
    return [found.get(file, "") for file in files]
