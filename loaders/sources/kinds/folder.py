"""A folder of images with one sub-folder per class."""

from collections.abc import Mapping
from pathlib import Path

from loaders.errors import UserError
from loaders.sources.folders import SETTINGS, classes_from_folders, files_below
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
    return classes_from_folders(files_below(root), file_in_folder, source, under, settings)
