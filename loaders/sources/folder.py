"""A folder of images with one sub-folder per class."""

import os
from pathlib import Path

from loaders.errors import UserError
from loaders.sources import FileRange, Listing, classes_from_folders

KIND = "folder"
HELP = "a folder with one sub-folder of images per class"


def accepts(source: str) -> bool:
    return Path(source).is_dir()


def listing(source: str, under: str | None = None) -> Listing:
    root = Path(source)
    if not root.is_dir():
        raise UserError(f"{source} is not a folder")
    files = {}
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            path = Path(folder, name)
            files[path.relative_to(root).as_posix()] = FileRange(str(path))
    return classes_from_folders(files, source, under)
