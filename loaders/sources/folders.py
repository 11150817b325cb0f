"""Which folder is the class of an image: what folders, tars and databases of CLASS/FILE share."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loaders.errors import UserError, in_words, shorten, unknown
from loaders.sources.classes import is_image_name, with_classes
from loaders.sources.listing import UNKNOWN, Listing, Reader, TableBuilder
from loaders.sources.names import as_text

LEVEL = {
    "level": "which folder is the class: 1, the first below SOURCE or --under (default); 2, …; last, the image's own"
}
LABELS = ("folders", "none")
SETTINGS = LEVEL | {"labels": "folders (default); none: images without labels, in any folders, to predict on"}
# Beside hidden ones: what notebooks, network drives, archivers and operating systems leave in folders of people.
_SYSTEM = frozenset(
    name.lower()
    for name in (
        "@eaDir", "@tmp", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "__MACOSX", "__pycache__",
        "$RECYCLE.BIN", "RECYCLER", "System Volume Information", "lost+found", "Network Trash Folder",
    )
)  # fmt: skip
_PARTS = frozenset(
    ("train", "training", "val", "valid", "validate", "validation", "test", "testing", "dev", "eval", "holdout")
)


@dataclass(frozen=True)
class Classes:
    """Which folders are classes."""

    of: dict[str, str]
    """Class of each folder that holds images."""
    wrapping: str
    """The folder below which the first level of classes is; empty for the source itself."""
    notes: tuple[str, ...]
    """What whoever packs this should know."""


def is_hidden(name: str) -> bool:
    """Whether a path leads through a folder that people did not make: a hidden one, or one of a system's."""
    return any(
        part.lower() in _SYSTEM or (part.startswith(".") and part not in (".", "..")) for part in name.split("/")
    )


def files_below(root: Path) -> Iterator[tuple[str, str, int, int]]:
    """What a folder holds, as `classes_from_folders` takes it: path within it, folder, offset, size. UserError for a
    folder that cannot be read, or that is linked in itself."""

    def stop(error: OSError) -> None:
        if not is_hidden(os.path.relpath(error.filename, root)):
            raise UserError(f"the folder {error.filename} cannot be read: {in_words(error, error.filename)}")

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


def find_classes(counts: Mapping[str, int], source: str, level: str | None = None) -> Classes:
    """The class of each folder; `counts`: path within the source ("a/cat") → images directly in it, none of them "".

    Without `level` it is the first folder below the source, or below the one folder that wraps all others. UserError
    where these hold the same folders, and so are parts (train, val) rather than classes.
    """
    if level == "last":
        return Classes({folder: folder.rpartition("/")[2] for folder in counts}, "", ())
    depth = _level(level)
    wrapping = "" if level else _wrapping(counts)
    parts = {folder: folder[len(wrapping) :].strip("/").split("/") for folder in counts}
    if shallow := [folder for folder in counts if len(parts[folder]) < depth]:
        raise UserError(
            f"{source}: with level={depth} the {counts[shallow[0]]:,} images directly in {shallow[0]} have no class"
        )
    notes = []
    if wrapping:
        notes.append(f"all images are in the folder {wrapping}; the folders in it are the classes")
    if not level:
        _check_parts(list(parts.values()), source)
    below = [folder for folder in counts if len(parts[folder]) > depth]
    if below:
        total = sum(counts[folder] for folder in below)
        notes.append(
            f"{total:,} images lie in sub-folders of their class, such as {below[0]};"
            f" they belong to the class (--set level={depth + 1} makes classes of such folders)"
        )
    return Classes({folder: parts[folder][depth - 1] for folder in counts}, wrapping, tuple(notes))


def classes_from_folders(
    files: Iterable[tuple[str, str, int, int]],
    reader: Callable[[str, str, int, int], Reader],
    source: str,
    under: str | None,
    settings: Mapping[str, str] | None = None,
) -> Listing:
    """Label files by the folder they lie in. `files`: path within the source ("a/b/cat/1.jpg"), place, offset, size;
    a path that ends in a slash is a folder.

    `reader(place, key, offset, size)` makes the reader. `under` keeps one sub-tree. The key is CLASS/…/FILE, so the
    same images give the same pack, as a folder or a tar. Hidden files, and what is in hidden or system folders, are
    counted and left out.
    """
    builder = TableBuilder(reader)
    settings = settings or {}
    if (labels := settings.get("labels", LABELS[0])) not in LABELS:
        raise unknown("value of --set labels", labels, LABELS)
    root = under.strip("/") if under else ""
    counts: dict[str, int] = {}  # images of each folder, in the order in which they are met
    number: dict[str, int] = {}
    ignored: list[str] = []
    hidden: list[str] = []
    elsewhere: set[str] = set()  # folders with images that --under leaves out
    all_folders: list[str] = []
    for raw, place, offset, size in files:
        whole = as_text(raw)
        if root and not whole.startswith(f"{root}/"):
            if is_image_name(whole) and not is_hidden(whole):
                elsewhere.add(whole.rpartition("/")[0].rpartition("/")[0])
            continue
        name = whole[len(root) + 1 :] if root else whole
        folder, _, file = name.rpartition("/")
        if whole.endswith("/"):
            all_folders += [] if is_hidden(folder) else [folder]
        elif is_hidden(folder):
            hidden += [whole] if is_image_name(file.lstrip(".")) else []
        elif not is_image_name(name):
            ignored.append(whole)
        else:
            counts[folder] = counts.get(folder, 0) + 1
            builder.add(name, number.setdefault(folder, len(number)), place, offset, size)
    if not counts:
        _raise_empty(source, under, sorted(elsewhere - {""}), ignored, hidden)
    skipped = [f"skipped {len(hidden):,} images in hidden or system folders, such as {hidden[0]}"] if hidden else []
    if labels == "none":
        table = builder.table()
        unlabelled = table.take(slice(None), np.full(len(table), UNKNOWN))
        return Listing(unlabelled, (), tuple(ignored), tuple(skipped))
    alone = root.rpartition("/")[2] if root and set(counts) == {""} else ""  # --under names a class
    if "" in counts and not alone:
        first = next(key for key in builder if "/" not in key)
        raise UserError(
            f"{source}: {counts['']:,} images are in no class folder, such as {f'{root}/{first}' if root else first};"
            " expected CLASS/IMAGE.jpg, one folder per class; --set labels=none takes images without labels"
        )
    found = Classes({"": alone}, "", ()) if alone else find_classes(counts, source, settings.get("level"))
    rank_of: dict[str, int] = {}
    rank = np.array([rank_of.setdefault(found.of[folder], len(rank_of)) for folder in number])
    table = builder.table()
    table, class_names = with_classes(table.take(slice(None), rank[table.labels]), list(rank_of), source)
    if alone or found.wrapping:
        table = table.renamed(f"{alone}/" if alone else "", f"{found.wrapping}/" if found.wrapping else "")
    notes = [*found.notes, *skipped]
    if empty := _empty_classes(all_folders, counts, found.wrapping):
        notes.append(f"warning: {len(empty):,} folders hold no images and become no class: {shorten(empty)}")
    return Listing(table, class_names, tuple(ignored), tuple(notes))


def _level(level: str | None) -> int:
    if level is not None and not (level.isascii() and level.isdecimal() and int(level) > 0):
        raise UserError(f"--set level={level}: expected 1, 2, … or last")
    return int(level or 1)


def _wrapping(counts: Mapping[str, int]) -> str:
    """The deepest folder that holds all images in folders of its own, "" for the source itself."""
    wrapping: list[str] = []
    parts = [folder.split("/") for folder in counts]
    while True:
        depth = len(wrapping)
        if len({folder[depth] for folder in parts}) > 1 or any(len(folder) == depth + 1 for folder in parts):
            return "/".join(wrapping)
        wrapping.append(parts[0][depth])


def _check_parts(folders: list[list[str]], source: str) -> None:
    """UserError where the first level is rather parts of a set than classes."""
    inside: dict[str, set[str]] = {}  # what folders each class holds
    direct = {path[0] for path in folders if len(path) == 1}
    for path in folders:
        inside.setdefault(path[0], set()).update(path[1:2])
    common = [name for name in set().union(*inside.values()) if sum(name in each for each in inside.values()) > 1]
    parts = [name for name in inside if name.lower() in _PARTS and name not in direct]
    if parts or (len(common) > 1 and not direct):
        shown = shorten(sorted(inside))
        raise UserError(
            f"{source} holds {shown}, each with folders such as {shorten(sorted(common or inside[parts[0]]))}: parts, "
            f"or classes? Choose a part with --under {sorted(parts or inside)[0]} and pack each by itself, or say which"
            " folders are the classes: --set level=1, level=2 or level=last"
        )


def _empty_classes(folders: Iterable[str], counts: Mapping[str, int], wrapping: str) -> list[str]:
    """Folders of the first level without any image."""
    prefix = f"{wrapping}/" if wrapping else ""
    used = {folder[len(prefix) :].split("/")[0] for folder in counts}
    first = {folder[len(prefix) :] for folder in folders if folder.startswith(prefix)}
    return sorted(folder for folder in first - used - {""} if "/" not in folder)


def _raise_empty(source: str, under: str | None, elsewhere: list[str], ignored: list[str], hidden: list[str]) -> None:
    if under and not (ignored or hidden):
        raise UserError(
            f"{source} has no images under {under!r}; its images are under {shorten(elsewhere) or 'no folder'}"
        )
    if hidden:
        found = f"only {len(hidden):,} in hidden or system folders, such as {hidden[0]}"
    else:
        found = f"only {len(ignored):,} other files, such as {ignored[0]}" if ignored else "it is empty"
    inside = f" under {under!r}" if under else ""
    raise UserError(f"{source} holds no images{inside} ({found}); expected CLASS/IMAGE.jpg, one folder per class")
