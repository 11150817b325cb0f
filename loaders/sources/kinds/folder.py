"""A folder of images with one sub-folder per class."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from loaders.errors import UserError
from loaders.sources.folders import SETTINGS, classes_from_folders, is_hidden
from loaders.sources.listing import Listing, file_in_folder

KIND = "folder"
HELP = "a folder with one sub-folder of images per class"
GENERAL = True
__all__ = ["GENERAL", "HELP", "KIND", "SETTINGS", "accepts", "listing"]


def accepts(source: str) -> bool:
    return Path(source).is_dir()


def listing(source: str, under: str | None = None, settings: Mapping[str, str] | None = None) -> Listing:
    root = Path(source)
    if not root.is_dir():
        raise UserError(f"{source} is not a folder")
    return classes_from_folders(_files(root), file_in_folder, source, under, settings)


def _files(root: Path) -> Iterator[tuple[str, str, int, int]]:
    """As `classes_from_folders` takes them. UserError for a folder that cannot be read, or that is linked in itself."""

    def stop(error: OSError) -> None:
        if not is_hidden(os.path.relpath(error.filename, root)):
            raise UserError(f"the folder {error.filename} cannot be read: {error.strerror}; nothing was packed")

    for folder, folders, names in os.walk(root, onerror=stop, followlinks=True):
        folders.sort()
        inside = Path(folder).relative_to(root).as_posix()
        if inside != ".":
            yield f"{inside}/", folder, 0, -1
        real = os.path.realpath(folder)
        for name in folders:
            path = os.path.join(folder, name)
            if os.path.islink(path) and f"{real}/".startswith(f"{os.path.realpath(path)}/"):
                raise UserError(f"{path} is a link to a folder that holds it; take it away")
        for name in names:
            yield (name if inside == "." else f"{inside}/{name}"), folder, 0, -1
