"""What an interrupted packing left: which of its shards are kept, and what is removed."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from loaders.errors import SystemRefusal, UserError
from loaders.packs.shard import Pack
from loaders.packs.writer import staged_path
from loaders.sources.listing import Listing


def fingerprint(listing: Listing, common: dict) -> str:
    """Equal for the same samples packed in the same way."""
    digest = hashlib.sha256(json.dumps([common, listing.class_names], sort_keys=True).encode())
    listing.table.fingerprint(digest)
    return digest.hexdigest()


def _attribute(path: Path, name: str) -> Any:
    try:
        return Pack.open(path, alone=True).attributes.get(name)
    except SystemRefusal:
        raise  # what nobody can read now may be whole
    except UserError:
        return None  # cut off or foreign: not ours to go on with


def interrupted(paths: list[Path], plan: str) -> str | None:
    """The `set` of an interrupted packing of the same plan, of which finished shards wait for the others."""
    for path in map(staged_path, paths):
        if path.exists() and _attribute(path, "plan") == plan:
            return _attribute(path, "set")
    return None


def remove_leftovers(dest: Path, kept: list[Path], earlier: str | None) -> None:
    """Remove what killed packings to this place left, but not the finished shards of the one that goes on."""
    shard = rf"\.{re.escape(dest.stem)}(-\d{{5}}-of-\d{{5}})?{re.escape(dest.suffix)}\.(partial|bytes|done)"
    for path in dest.parent.glob(".*"):
        if re.fullmatch(shard, path.name) and not (path in kept and _attribute(path, "set") == earlier):
            path.unlink()


def is_finished(path: Path, wanted: str) -> bool:
    """Whether this shard of the packing was written before: verified then, and under its name only when whole."""
    return any(p.exists() and _attribute(p, "set") == wanted for p in (staged_path(path), path))
