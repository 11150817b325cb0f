"""A tar of class folders, or one in WebDataset naming: KEY.jpg beside KEY.cls or KEY.json."""

import json
import tarfile
from pathlib import Path, PurePosixPath

from loaders.errors import UserError
from loaders.sources import FileRange, Item, Listing, classes_from_folders, is_image_name

KIND = "tar"
HELP = "a tar of such a folder, or of KEY.jpg with KEY.cls or KEY.json (WebDataset)"
_LABELS = (".cls", ".json")
_JSON_FIELDS = ("label", "cls", "class")


def accepts(source: str) -> bool:
    path = Path(source)
    return path.is_file() and (tarfile.is_tarfile(path) or ".tar" in path.suffixes)


def listing(source: str, under: str | None = None) -> Listing:
    files = _members(source)
    stems = {_stem(name) for name in files if name.lower().endswith(_LABELS)}
    if any(is_image_name(name) and _stem(name) in stems for name in files):
        return _webdataset(files, source, under)
    return classes_from_folders(files, source, under)


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


def _webdataset(files: dict[str, FileRange], source: str, under: str | None) -> Listing:
    labels: dict[str, int | str] = {}
    images: dict[str, str] = {}
    ignored = []
    for name in files:
        if under and not PurePosixPath(name).is_relative_to(under):
            continue
        stem = _stem(name)
        if name.lower().endswith(_LABELS):
            if stem not in labels or name.lower().endswith(".cls"):
                labels[stem] = _label(name, files[name].read(), source)
        elif is_image_name(name):
            if stem in images:
                raise UserError(f"{source}: the sample {stem} has two images, {images[stem]} and {name}")
            images[stem] = name
        else:
            ignored.append(name)
    if not images:
        raise UserError(f"{source} holds no images" + (f" under {under!r}" if under else ""))
    unlabelled = sorted(images.keys() - labels.keys())
    if unlabelled:
        raise UserError(
            f"{source}: {len(unlabelled):,} of {len(images):,} samples have neither .cls nor .json, such as"
            f" {unlabelled[0]}"
        )
    used = {labels[stem] for stem in images}
    if all(isinstance(label, int) for label in used):
        if min(used) < 0:
            raise UserError(f"{source}: class numbers must be 0 or more, found {min(used)}")
        names = tuple(str(number) for number in range(max(used) + 1))
    else:
        names = tuple(sorted(str(label) for label in used))
    number = {name: i for i, name in enumerate(names)}
    items = [Item(name, files[name], number[str(labels[stem])]) for stem, name in images.items()]
    return Listing(sorted(items, key=lambda item: item.key), names, tuple(ignored))


def _label(name: str, data: bytes, source: str) -> int | str:
    try:
        value = data.decode().strip()
        if name.lower().endswith(".json"):
            fields = json.loads(value)
            value = next(fields[field] for field in _JSON_FIELDS if field in fields)
        if isinstance(value, str) and value:
            return int(value) if value.isdecimal() else value
        if isinstance(value, int):
            return value
    except (ValueError, StopIteration, TypeError):
        pass
    raise UserError(
        f"{source}: {name} holds no label; a .cls is a class number or name, a .json an object with"
        f" {' or '.join(map(repr, _JSON_FIELDS))}"
    )
