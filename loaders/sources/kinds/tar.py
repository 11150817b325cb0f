"""Tars of class folders, or in WebDataset naming: KEY.jpg beside KEY.cls or KEY.json; many by a pattern."""

import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from loaders.errors import UserError
from loaders.sources.classes import expand, is_image_name, with_classes
from loaders.sources.folders import SETTINGS, classes_from_folders
from loaders.sources.listing import FileRange, Listing, TableBuilder, file_range

KIND = "tar"
HELP = (
    "a tar of such a folder, or of KEY.jpg with KEY.cls or KEY.json (WebDataset); or a pattern such as"
    " 'train-*.tar' or 'train-{0000..0146}.tar'; of tars without folders each is a class"
)
__all__ = ["HELP", "KIND", "SETTINGS", "accepts", "listing"]
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
            raise UserError(f"{source} is WebDataset, whose labels are files: there is no --set level")
        return _webdataset(paths, source, under)
    return classes_from_folders(_files(paths), file_range, source, under, settings)


def _files(paths: list[str]) -> Iterator[tuple[str, str, int, int]]:
    for path in paths:
        for name, part in _members(path).items():
            loose = len(paths) > 1 and "/" not in name
            yield (f"{Path(path).stem}/{name}" if loose else name), path, part.offset, part.size


def _members(source: str) -> dict[str, FileRange]:
    if not Path(source).is_file():
        raise UserError(f"there is no tar at {source}")
    files = {}
    try:
        with tarfile.open(source, "r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    name = str(PurePosixPath(member.name))
                    files[name] = FileRange(source, member.offset_data, member.size)
    except tarfile.TarError as error:
        with open(source, "rb") as file:
            start = file.read(6)
        if start[:2] == b"\x1f\x8b" or start[:3] == b"BZh" or start == b"\xfd7zXZ\0":
            raise UserError(f"{source} is compressed; unpack it to a plain tar or a folder first") from error
        raise UserError(f"{source} cannot be read as a tar ({error}); is it complete?") from error
    size = Path(source).stat().st_size
    for name, part in files.items():
        if part.offset + part.size > size:
            raise UserError(f"{source} is truncated: it ends within {name}; copy or download it again")
    return files


def _stem(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".", 1)[0]


def _webdataset(paths: list[str], source: str, under: str | None) -> Listing:
    builder, ignored = TableBuilder(file_range), []
    number: dict[int | str, int] = {}  # of each label, in the order in which they are met
    unlabelled: list[str] = []
    for path in paths:
        labels: dict[str, int | str] = {}
        images: dict[str, str] = {}
        files = _members(path)
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
    return Listing(*with_classes(builder.table(), list(number), source), tuple(ignored))


def _label(name: str, data: bytes, source: str) -> int | str:
    try:
        value: Any = data.decode().strip()
        if name.lower().endswith(".json"):
            fields = json.loads(value)
            value = next((fields[field] for field in _JSON_FIELDS if field in fields), None)
    except (ValueError, TypeError):  # neither text nor JSON, or JSON of a single value
        value = None
    if isinstance(value, str) and value:
        return int(value) if value.isdecimal() else value
    if isinstance(value, int):
        return value
    raise UserError(
        f"{source}: {name} holds no label; a .cls is a class number or name, a .json an object with"
        f" {' or '.join(map(repr, _JSON_FIELDS))}"
    )
