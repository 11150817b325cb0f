"""Tars of class folders, or in WebDataset naming: KEY.jpg beside KEY.cls or KEY.json; many by a pattern."""

import json
import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from loaders.errors import UserError, reason
from loaders.sources.classes import as_meant, check_label, expand, is_image_name, with_classes
from loaders.sources.folders import SETTINGS, classes_from_folders, is_hidden
from loaders.sources.listing import FileRange, Listing, TableBuilder, file_range
from loaders.sources.names import as_text, telling_apart

KIND = "tar"
HELP = (
    "a tar of such a folder, or of KEY.jpg with KEY.cls or KEY.json (WebDataset); or a pattern such as"
    " 'train-*.tar' or 'train-{0000..0146}.tar'; of tars without folders each is a class"
)
__all__ = ["HELP", "KIND", "SETTINGS", "accepts", "listing"]
_MOST_LINKS = 40  # one after another, as Linux has it
_DEEPEST = 100  # folders in one another
# A link of such a name may lead nowhere: no image is missed.
_NOTES = frozenset((".txt", ".md", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".log", ".py", ".html", ".pdf"))
_LABELS = (".cls", ".json")
_JSON_FIELDS = ("label", "cls", "class")


def accepts(source: str) -> bool:
    paths = expand(source)
    first = Path(paths[0]) if paths else Path(source)
    return first.is_file() and (".tar" in first.suffixes or tarfile.is_tarfile(first))


def listing(source: str, under: str | None = None, settings: Mapping[str, str] | None = None) -> Listing:
    paths = expand(source)
    if not paths:
        raise UserError(f"no file matches {source}")
    first = _members(paths[0])
    stems = {_stem(name) for name in first if name.lower().endswith(_LABELS)}
    if any(is_image_name(name) and _stem(name) in stems for name in first):
        if settings:
            raise UserError(f"{source} is WebDataset, whose labels are files: there is no --set {next(iter(settings))}")
        return _apart(_webdataset(paths, source, under), paths)
    notes: list[str] = []
    found = classes_from_folders(_files(paths, notes), file_range, source, under, settings)
    return _apart(replace(found, notes=(*found.notes, *notes)), paths)


def _apart(found: Listing, paths: list[str]) -> Listing:
    """Where names of samples begin anew in each tar, that of the tar becomes part of them."""
    names = [name.removesuffix(".tar") for name in telling_apart(paths)]
    table = found.table.apart(dict(zip(paths, names, strict=True)))
    if table is found.table:
        return found
    note = f"tars have samples of the same name; the tar is part of each, as in {table[0].key}"
    return replace(found, items=table, notes=(*found.notes, note))


def _files(paths: list[str], notes: list[str]) -> Iterator[tuple[str, str, int, int]]:
    for path in paths:
        for name, part in _members(path, notes).items():
            loose = len(paths) > 1 and "/" not in name
            yield (f"{Path(path).stem}/{name}" if loose else name), path, part.offset, part.size


def _members(source: str, notes: list[str] | None = None) -> dict[str, FileRange]:
    """The files of a tar by their names; `notes` is told what is left out."""
    if not Path(source).is_file():
        raise UserError(f"there is no tar at {source}")
    files: dict[str, FileRange] = {}
    links: dict[str, str] = {}
    replaced: list[str] = []
    try:
        with tarfile.open(source, "r:") as tar:
            for member in tar:
                name = _plain(member.name)
                if files.pop(name, None) or links.pop(name, None):  # of what is there twice, the last counts
                    replaced.append(name)
                if member.issparse():
                    raise UserError(f"{source}: {name} is stored with holes; make the tar without --sparse")
                if member.isreg():
                    files[name] = FileRange(source, member.offset_data, member.size)
                elif member.issym():
                    links[name] = _plain(posixpath.join(posixpath.dirname(name), member.linkname))
                elif member.islnk():
                    links[name] = _plain(member.linkname)
            ends = _check_end(source, tar.offset)
    except tarfile.TarError as error:
        with open(source, "rb") as file:
            start = file.read(6)
        if start[:2] == b"\x1f\x8b" or start[:3] == b"BZh" or start == b"\xfd7zXZ\0":
            raise UserError(f"{source} is compressed; unpack it to a plain tar or a folder first") from error
        raise UserError(f"{source} cannot be read as a tar ({error}); is it complete?") from error
    files |= _followed(files, links, source)
    size = Path(source).stat().st_size
    for name, part in files.items():
        if part.offset + part.size > size:
            raise UserError(f"{source} is truncated: it ends within {name}; copy or download it again")
    if notes is not None and replaced:
        notes.append(
            f"{len(replaced):,} files of {source} have a name that comes again, such as {as_text(replaced[0])}; the"
            " last of each name counts, as when it is unpacked"
        )
    if notes is not None and not ends:
        notes.append(f"warning: {source} has no end mark: it may be cut off after its last file")
    return files


def _check_end(source: str, offset: int) -> bool:
    """Whether there is an end mark at `offset`, where Python saw no further file. UserError where more follows: Python
    would pass over it without a word."""
    with open(source, "rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if any(block):
            raise UserError(f"{source} is damaged: what begins at byte {offset:,} is no file of a tar; copy it again")
        while rest := file.read(1 << 20):
            if any(rest):
                raise UserError(
                    f"{source} goes on after its end, at byte {offset:,}, as tars do that were joined by `cat`; pack"
                    " each by itself, with a pattern, or join them with `tar --concatenate`"
                )
    return bool(block)


def _plain(name: str) -> str:
    """A path within the archive, from its top."""
    return posixpath.normpath(name).lstrip("/")


def _followed(files: dict[str, FileRange], links: dict[str, str], source: str) -> dict[str, FileRange]:
    """What the links of an archive stand for: files, and the files of folders. UserError where they lead nowhere."""
    found: dict[str, FileRange] = {}
    lost: list[str] = []
    inside: dict[str, list[str]] = {}  # what lies below each folder, links too
    for entry in (*files, *links) if links else ():
        for parent in PurePosixPath(entry).parents:
            inside.setdefault(str(parent), []).append(entry)
    waiting = list(links)
    while waiting:
        name = waiting.pop()
        target = _target(name, links)
        if f"{name}/".startswith(f"{target}/") and target not in links:
            raise UserError(f"{source}: {name} is a link to {target}, a folder that holds it; take it away")
        if name.count("/") > _DEEPEST:
            raise UserError(f"{source}: its links lead in a circle, such as {name[:200]}; take one away")
        if target in files:
            found[name] = files[target]
            continue
        for entry in inside.get(target, ()):
            path = name + entry[len(target) :]
            if entry in files:
                found[path] = files[entry]
            else:
                waiting.append(path)
        if target not in inside and PurePosixPath(name).suffix.lower() not in _NOTES and not is_hidden(name):
            lost.append(f"{name} → {links.get(name, target)}")
    if lost:
        raise UserError(
            f"{source}: {len(lost):,} links lead to nothing in it, such as {lost[0]}; make the tar anew with"
            " --dereference, or pack the folder itself"
        )
    return found


def _target(name: str, links: dict[str, str]) -> str:
    """Where a path leads once all links on its way are followed; a circle ends where it began, at a link."""
    for _ in range(_MOST_LINKS):
        parts = name.split("/")
        heads = ("/".join(parts[:k]) for k in range(1, len(parts) + 1))
        link = next((head for head in heads if head in links), None)
        if link is None:
            break
        name = _plain(links[link] + name[len(link) :])
    return name


def _stem(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".", 1)[0]


def _webdataset(paths: list[str], source: str, under: str | None) -> Listing:
    builder, ignored = TableBuilder(file_range), []
    number: dict[int | str, int] = {}  # of each label, in the order in which they are met
    unlabelled: list[str] = []
    notes: list[str] = []
    for path in paths:
        labels: dict[str, int | str] = {}
        images: dict[str, str] = {}
        files = {as_text(name): part for name, part in _members(path, notes).items()}
        for name, part in files.items():
            if under and not PurePosixPath(name).is_relative_to(under):
                continue
            stem = _stem(name)
            if name.lower().endswith(_LABELS):
                if stem not in labels or name.lower().endswith(".cls"):
                    labels[stem] = _label(name, part.read(), path)
            elif is_image_name(name):
                if stem in images:
                    raise UserError(f"{path}: the sample {stem} has two images, {images[stem]} and {name}")
                images[stem] = name
            else:
                ignored.append(name)
        unlabelled += sorted(images.keys() - labels.keys())
        for stem, name in images.items():
            if stem in labels:
                place = number.setdefault(labels[stem], len(number))
                builder.add(name, place, path, files[name].offset, files[name].size)
    if unlabelled:
        raise UserError(
            f"{source}: {len(unlabelled):,} of {len(builder) + len(unlabelled):,} samples have neither .cls nor .json,"
            f" such as {unlabelled[0]}"
        )
    if not len(builder):
        raise UserError(f"{source} holds no images" + (f" under {under!r}" if under else ""))
    return Listing(*with_classes(builder.table(), as_meant(list(number), source), source), tuple(ignored), tuple(notes))


def _label(name: str, data: bytes, source: str) -> int | str:
    try:
        value: Any = data.decode().strip()
        if name.lower().endswith(".json"):
            content = json.loads(value)
            there = [field for field in _JSON_FIELDS if field in content] if isinstance(content, dict) else []
            if not there:
                raise ValueError("there is no label")
            value = content[there[0]]
        return check_label(value)
    except (ValueError, RecursionError) as error:  # neither text nor JSON, or no label
        raise UserError(
            f"{source}: {name} holds no label that can be used: {reason(error)}; a .cls is a class number or name, a"
            f" .json an object with {' or '.join(map(repr, _JSON_FIELDS))}"
        ) from error
