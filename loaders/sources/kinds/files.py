"""Files without labels: an image, those that a pattern names, or those of a list."""

from pathlib import Path

from loaders.errors import UserError
from loaders.sources.classes import expand, is_image_name
from loaders.sources.listing import UNKNOWN, Listing, TableBuilder, file_range
from loaders.sources.names import as_text, telling_apart

KIND = "files"
HELP = (
    "an image, a pattern such as 'scans/*.png', or a .txt file with a path on each line: without labels, to predict on"
)


def accepts(source: str) -> bool:
    found = expand(source)
    return bool(found) and all(Path(path).is_file() and (is_image_name(path) or _is_list(path)) for path in found)


def listing(source: str, under: str | None = None) -> Listing:
    if under:
        raise UserError(f"{source} has no parts, so --under cannot choose one")
    found = expand(source)
    if not found:
        raise UserError(f"no file matches {source}")
    builder = TableBuilder(file_range)
    if len(found) == 1 and _is_list(found[0]):
        lines = Path(found[0]).read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
        for name in filter(None, map(str.strip, lines)):
            builder.add(as_text(name), UNKNOWN, str(Path(found[0]).parent / name))
    else:
        for name, path in zip(telling_apart(found), found, strict=True):
            builder.add(name, UNKNOWN, path)
    if not len(builder):
        raise UserError(f"{source} names no images; expected a path on each line")
    return Listing(builder.table(), ())


def _is_list(path: str) -> bool:
    return path.lower().endswith(".txt")
