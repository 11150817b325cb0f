"""The images to predict on: a pack, or any source that can be packed, as it then is for a while."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.comm.communicator import Communicator, SharedError
from loaders.errors import UserError, in_words
from loaders.packing.find import find_source, list_source
from loaders.packing.options import Options
from loaders.packing.ranks import Alone
from loaders.packing.spreading import pack
from loaders.packs.shard import Pack, existing_shards
from loaders.sources.listing import Listing

_HDF5 = b"\x89HDF\r\n\x1a\n"
_SETTINGS = {"unlabelled": "keep"}  # where a kind of source has them, and nothing else is asked for


@dataclass(frozen=True)
class Choice:
    """What is taken of a source that is no pack, as for `loaders.pack`."""

    kind: str | None = None
    under: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    workers: int | None = None
    """Processes that decode, on each rank; None: one for each core that it has."""


@dataclass(frozen=True)
class Images:
    """What is predicted on."""

    pack: Pack
    about: dict[str, Any]
    """Where it is from, for `FILE.about.json`."""
    unreadable: tuple[tuple[str, str], ...]
    """Key and reason of each file that did not decode when it was packed."""
    notes: tuple[str, ...]
    """What whoever predicts should know."""


@contextmanager
def opened(source: str, choice: Choice, out: Path, comm: Communicator, *, quiet: bool = False) -> Iterator[Images]:
    """The images of a source while the block lasts. All ranks call it; SharedError on all for what cannot be used.

    What is no pack is packed into a hidden folder beside `out`, all ranks taking part, and removed in the end.
    """
    if is_pack(source):
        with comm.together():
            if choice.kind or choice.under or choice.settings:
                raise UserError(f"{source} is a pack: --kind, --under and --set are for sources that are none")
            found = Pack.open(source)
        yield Images(found, _about(source, found), (), ())
        return
    listed: tuple[str, Listing] | None = None
    notes: tuple[str, ...] = ()
    folder = None
    with comm.together():
        if comm.leads:
            kind, listing, notes = _listed(source, choice)
            listed = kind, listing
            out.parent.mkdir(parents=True, exist_ok=True)
            folder = tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent)
    try:
        shards, folder = comm.exchange((min(comm.size, max(1, len(listed[1].table))), folder) if listed else (0, None))[
            0
        ]
        place = Path(folder) / "images.h5"
        workers = len(os.sched_getaffinity(0)) if choice.workers is None else choice.workers
        try:
            options = Options(shards=shards, workers=workers)
            report = pack(source, place, options, quiet=quiet, ranks=_Ranks(comm), listed=listed)
        except (UserError, OSError) as error:
            raise SharedError(in_words(error)) from error  # `pack` raises it on all ranks
        with comm.together():
            found = Pack.open(place)
        yield Images(found, _about(source, found), report.bad, notes)
        comm.exchange(None)  # nobody reads any more
    finally:
        if comm.leads and folder:
            shutil.rmtree(folder, ignore_errors=True)


def is_pack(source: str) -> bool:
    """Whether the source is a pack, rather than what could be packed."""
    for path in existing_shards(source)[:1]:
        with open(path, "rb") as file:
            return file.read(len(_HDF5)) == _HDF5
    return False


def _about(source: str, found: Pack) -> dict[str, Any]:
    return {
        "path": source,
        "kind": found.attributes.get("kind", ""),
        "source": found.attributes.get("source", ""),  # of a pack: what it was packed from
        "images": len(found),
    }


def _listed(source: str, choice: Choice) -> tuple[str, Listing, tuple[str, ...]]:
    """Kind of a source, what it holds, and what there is to say: without labels where it has none that can be read."""
    module = find_source(source, choice.kind)
    known = getattr(module, "SETTINGS", {})
    settings = {name: value for name, value in _SETTINGS.items() if name in known} | dict(choice.settings)
    try:
        return module.KIND, list_source(module, source, choice.under, settings), ()
    except UserError as error:
        if "labels" not in known or "labels" in settings:
            raise
        try:
            found = list_source(module, source, choice.under, {**settings, "labels": "none"})
        except UserError:
            raise error from None
        return module.KIND, found, (f"without labels: {error}",)


class _Ranks(Alone):
    """Ranks that pack together, as `loaders.packing` knows them."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.rank, self.size = comm.rank, comm.size

    def gather(self, value: Any) -> list:
        return self._comm.exchange(value)

    def abort(self, code: int) -> None:
        self._comm.abort(code)
