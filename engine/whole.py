"""Files that appear whole or not at all, pictures among them, and JSON that every reader takes."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from loaders.errors import UserError, in_words

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A temporary place beside `path`, which gets that name when the block ends well; nothing stays when it does not.

    The folder is made where it is missing. UserError for what is there and no file, such as /dev/stdout: it would be
    replaced.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file; expected the name of one, which is made or replaced")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def system_speaks(path: str | Path) -> Iterator[None]:
    """Around a library that writes `path`: what it makes of an OSError becomes one again, with its number and file."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        inner: BaseException | None = error
        while inner is not None and not isinstance(inner, OSError):
            inner = inner.__context__
        said = re.search(r"\(os error (\d+)\)", str(error))  # of what is written in Rust
        number = inner.errno if inner is not None else int(said[1]) if said else None
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


@contextlib.contextmanager
def may_wait(path: Path, then: str) -> Iterator[None]:
    """Around writing that can be done later: a full disk is a warning that names `path`, the file system, and what
    happens `then`. Other OSErrors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _LOG.warning("warning: %s cannot be written: %s; %s; %s", path, in_words(error), file_system(path), then)


def file_system(path: Path) -> str:
    """Which file system a path is on, and what is free there, for people."""
    place = Path(os.path.realpath(path))
    while not os.path.ismount(place):
        place = place.parent
    room = shutil.disk_usage(place)
    return f"file system {place} has {room.free / 1e9:,.3f} of {room.total / 1e9:,.1f} GB free"


def picture(figure: Any, path: Path, dpi: int = 110) -> None:
    """Write a figure of matplotlib in the format that the name ends with, whole. UserError for another ending."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"{path} does not end as a picture does; expected such as .png, .svg or .pdf")
    with whole(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=dpi)


def mend_last_line(file: BinaryIO) -> None:
    """Make a file of JSON lines, open for reading and appending, ready for the next: what a killed writer left of its
    last line is removed, or it would take the next one with it; a line that lacks only its end gets it."""
    file.seek(0)
    before, newline, rest = file.read().rpartition(b"\n")
    if not rest:
        return
    try:
        json.loads(rest)
        file.write(b"\n")
    except ValueError:
        file.truncate(len(before) + len(newline))


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk: a rename is not, until then. File systems that cannot are left as they are."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON for people, the folder too where it is missing: whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json_text(value, indent=1) + "\n", encoding="utf-8")


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON, with null in place of NaN and the infinities, which JSON does not have."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_finite(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
