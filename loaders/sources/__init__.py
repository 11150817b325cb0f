"""Where packs come from: one module per kind of source. A new kind is a new module here, nothing else.

Such a module has `KIND` (its name for --kind), `HELP` (what SOURCE looks like), `accepts(source) -> bool` (whether
this is such a source, cheaply) and `listing(source, under) -> Listing`.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType

from loaders.errors import UserError

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2"))
_SHOWN = 8  # names listed in a message before "…"


@dataclass(frozen=True)
class Bytes:
    """A file that is in memory."""

    data: bytes
    """All of it."""

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True)
class FileRange:
    """A file on disk, or a part of one (a member of a tar)."""

    path: str
    """The file that is opened."""
    offset: int = 0
    """First byte."""
    size: int = -1
    """Number of bytes; -1: to the end."""

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if 0 <= self.size != len(data):
            raise OSError(f"{self.path} ends {self.size - len(data):,} bytes too early")
        return data


@dataclass(frozen=True)
class Item:
    """One sample of a source. Its image is read in a worker process, so the reader must pickle."""

    key: str
    """Unique name within the pack."""
    reader: Bytes | FileRange
    """Where the encoded image is."""
    label: int | tuple[float, ...]
    """Class number, or one number per label with NaN for unknown."""
    group: int = -1
    """Samples of one group (a patient) stay on one side of a split; -1 for none."""


@dataclass(frozen=True)
class Listing:
    """What a source holds."""

    items: Sequence[Item]
    """In the order in which they are packed: sorted by key."""
    class_names: tuple[str, ...]
    """Names of the classes or labels."""
    ignored: tuple[str, ...] = ()
    """Files that were found and are not images."""


def kinds() -> dict[str, ModuleType]:
    """The modules of this package by their KIND."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {module.KIND: module for module in modules}


def find_source(source: str, kind: str | None = None) -> ModuleType:
    """The module for this source: the one named, else the one that accepts what is there."""
    known = kinds()
    if kind is not None:
        if kind not in known:
            raise UserError(f"unknown kind of source {kind!r}; there are {', '.join(known)}")
        return known[kind]
    for module in known.values():
        if module.accepts(source):
            return module
    expected = "; ".join(f"{name}: {module.HELP}" for name, module in known.items())
    if ":" not in source and not Path(source).exists():
        raise UserError(f"there is nothing at {source}; SOURCE may be – {expected}")
    raise UserError(f"{source} is not a source that can be packed; SOURCE may be – {expected}")


def is_image_name(name: str) -> bool:
    """Whether a path looks like an image by its extension; hidden files never do."""
    path = PurePosixPath(name)
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def classes_from_folders(files: dict[str, FileRange], source: str, under: str | None) -> Listing:
    """Label files by the folder they lie in; `files` maps each path ("a/b/cat/1.jpg") to its reader.

    `under` keeps one sub-tree. The key is CLASS/FILE, so the same images give the same pack, as a folder or a tar.
    """
    kept, ignored = {}, []
    for name, reader in files.items():
        path = PurePosixPath(name)
        if under and not path.is_relative_to(PurePosixPath(under)):
            continue
        if is_image_name(name):
            kept[path] = reader
        else:
            ignored.append(name)
    if under and not kept:
        trees = sorted({str(PurePosixPath(name).parent.parent) for name in files if is_image_name(name)} - {"."})
        raise UserError(f"{source} has no images under {under!r}; its images are under {shorten(trees) or 'no folder'}")
    if not kept:
        found = f"only {len(ignored):,} other files, such as {ignored[0]}" if ignored else "it is empty"
        raise UserError(f"{source} holds no images ({found}); expected CLASS/IMAGE.jpg, one folder per class")
    loose = [str(path) for path in kept if path.parent == PurePosixPath(".")]
    if loose:
        raise UserError(
            f"{source}: {len(loose):,} images are in no class folder, such as {loose[0]};"
            " expected CLASS/IMAGE.jpg, one folder per class"
        )
    trees: dict[str, set[str]] = {}
    for path in kept:
        trees.setdefault(path.parent.name, set()).add(str(path.parent.parent))
    for name, parents in trees.items():
        if len(parents) > 1:
            raise UserError(
                f"{source}: the class {name!r} is found under {shorten(sorted(parents))};"
                " choose one with --under, and pack each by itself"
            )
    names = sorted(trees)
    number = {name: i for i, name in enumerate(names)}
    items = [Item(f"{path.parent.name}/{path.name}", reader, number[path.parent.name]) for path, reader in kept.items()]
    return Listing(sorted(items, key=lambda item: item.key), tuple(names), tuple(ignored))


def shorten(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:_SHOWN]) + (f", … ({len(names):,} in all)" if len(names) > _SHOWN else "")
