"""Packing a source: shard by shard, on one node or over many, going on after a kill where it stopped."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from loaders.errors import UserError
from loaders.packing.find import find_source, list_source
from loaders.packing.ranks import Alone
from loaders.packs.shard import Pack, existing_shards, shard_paths
from loaders.packs.writer import Record, ShardWriter, new_attributes, staged_path
from loaders.sources.checking import check_items, in_processes
from loaders.sources.images import JPEG_QUALITY
from loaders.sources.listing import Listing, Table
from loaders.sources.select import keep_classes, shuffled, split


@dataclass(frozen=True)
class Options:
    """How to pack; the fields are the command line's options."""

    kind: str | None = None
    """Kind of source; found from what is there when None."""
    under: str | None = None
    """Take this sub-tree, or part, of the source only."""
    settings: dict[str, str] = field(default_factory=dict)
    """Of the kind of source, by name: those that its module explains in `SETTINGS`."""
    classes: tuple[str, ...] = ()
    """Take these classes only, numbered in this order; empty: all."""
    part: str = "all"
    """all, train or test: a side of the deterministic split."""
    holdout: float = 0.2
    """Fraction of each class that is the test part."""
    shuffle: bool = False
    """Pack in a fixed random order in place of sorted by name, so that neighbours are of different classes."""
    shards: int = 1
    """Number of files."""
    resize: int | None = None
    """Re-encode images to this short side, in pixels, where they are larger."""
    quality: int = JPEG_QUALITY
    """Of JPEGs that are encoded anew, 1 to 95."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that decode, on each rank; 0: none but this one."""
    skip_bad: bool = False
    """Whether files that do not decode are acceptable: they are left out in any case."""
    force: bool = False
    """Replace an existing pack."""
    restart: bool = False
    """Begin anew, without the finished shards of an interrupted packing."""
    mpi: bool = False
    """Share the shards among the ranks of an MPI job."""


@dataclass(frozen=True)
class Report:
    """What packing did."""

    records: int
    """Images in the pack."""
    bad: tuple[tuple[str, str], ...]
    """Key and reason of each file that did not decode."""
    changes: dict[str, int]
    """Images whose bytes are not those of the source, by reason."""
    resumed: int
    """Shards that an interrupted packing had finished."""


@dataclass(frozen=True)
class _Plan:
    """What all ranks agree on before they start."""

    paths: list[Path]
    bounds: list[int]
    table: Table
    class_names: tuple[str, ...]
    attributes: list[dict]


@dataclass(frozen=True)
class _Job:
    """One shard to write."""

    path: Path
    items: Table
    class_names: tuple[str, ...]
    attributes: dict
    resize: int | None
    quality: int


def pack(source: str, dest: str | Path, options: Options, *, quiet: bool = False, ranks: Alone | None = None) -> Report:
    """Pack a source into DEST.h5 or its shards without the files that do not decode, and verify what was written.

    Nothing appears under the final name before all is whole. Finished shards of an interrupted packing of the same
    samples are kept. On several ranks each writes its share of the shards; all return the same report.
    Raises UserError for input that cannot be used, on all ranks alike.
    """
    dest, ranks = Path(dest), ranks or Alone()
    quiet = quiet or ranks.rank > 0
    plan, *_ = _together(ranks, lambda: _plan(source, dest, options, quiet) if ranks.rank == 0 else None)
    written = _together(ranks, lambda: list(_write(plan, options, quiet, ranks)))
    shards = sorted(shard for part in written for shard in part)
    report, *_ = _together(ranks, lambda: _publish(shards, source, dest) if ranks.rank == 0 else None)
    return report


def _together(ranks: Alone, work: Callable[[], Any]) -> list:
    """Do something on every rank; the results of all. The first rank's UserError or OSError is raised on all."""
    result, error = None, None
    try:
        result = work()
    except (UserError, OSError) as found:
        error = found
    gathered = ranks.gather((result, error))
    for _, other in gathered:
        if other is not None:
            raise other
    return [value for value, _ in gathered]


def _plan(source: str, dest: Path, options: Options, quiet: bool) -> _Plan:
    _check_destination(dest, options)
    module = find_source(source, options.kind)
    listing = list_source(module, source, options.under, options.settings)
    listing = replace(listing, items=listing.table)
    if options.classes:
        listing = keep_classes(listing, options.classes)
    listing = split(listing, options.part, options.holdout)
    _check_listing(listing, source, options)
    if options.shuffle:
        listing = shuffled(listing)
    for remark in () if quiet else listing.remarks:
        print(remark)
    names = {
        "kind": module.KIND,
        "resize": options.resize or 0,
        "quality": options.quality,
        "tools": json.dumps(_tools()),
    }
    chosen = ("under", "settings", "classes", "part", *(("holdout",) if options.part != "all" else ()), "shuffle")
    choice = {name: getattr(options, name) for name in chosen if getattr(options, name)}
    common = {"source": source, **names, "selection": json.dumps(choice)}
    common["plan"] = _fingerprint(listing, {**common, "shards": options.shards})

    dest.parent.mkdir(parents=True, exist_ok=True)
    paths = shard_paths(dest, options.shards)
    attributes = new_attributes(common, options.shards)
    earlier = None if options.restart else _interrupted(paths, common["plan"])
    if earlier:
        attributes = [{**each, "set": earlier} for each in attributes]
    bounds = [round(k * len(listing.table) / options.shards) for k in range(options.shards + 1)]
    _remove_leftovers(dest, [staged_path(path) for path in paths] if earlier else [], earlier)
    return _Plan(paths, bounds, listing.table, listing.class_names, attributes)


def _fingerprint(listing: Listing, common: dict) -> str:
    """Equal for the same samples packed in the same way."""
    digest = hashlib.sha256(json.dumps([common, listing.class_names], sort_keys=True).encode())
    listing.table.fingerprint(digest)
    return digest.hexdigest()


def _attribute(path: Path, name: str) -> Any:
    try:
        return Pack.open(path, alone=True).attributes.get(name)
    except UserError:
        return None  # cut off or foreign: not ours to go on with


def _interrupted(paths: list[Path], plan: str) -> str | None:
    """The `set` of an interrupted packing of the same plan, of which finished shards wait for the others."""
    for path in map(staged_path, paths):
        if path.exists() and _attribute(path, "plan") == plan:
            return _attribute(path, "set")
    return None


def _remove_leftovers(dest: Path, kept: list[Path], earlier: str | None) -> None:
    """Remove what killed packings to this place left, but not the finished shards of the one that goes on."""
    shard = rf"\.{re.escape(dest.stem)}(-\d{{5}}-of-\d{{5}})?{re.escape(dest.suffix)}\.(partial|bytes|done)"
    for path in dest.parent.glob(".*"):
        if re.fullmatch(shard, path.name) and not (path in kept and _attribute(path, "set") == earlier):
            path.unlink()


def _write(plan: _Plan, options: Options, quiet: bool, ranks: Alone) -> Iterator[tuple[Path, bool]]:
    """Write this rank's shards; each one's path, and whether it was there before."""
    mine = range(ranks.rank, len(plan.paths), ranks.size)
    todo = [k for k in mine if not _finished(plan.paths[k], plan.attributes[k]["set"])]
    yield from ((plan.paths[k], True) for k in mine if k not in set(todo))
    sizes = {k: plan.bounds[k + 1] - plan.bounds[k] for k in mine}
    jobs = (
        _Job(
            plan.paths[k],
            plan.table.take(slice(plan.bounds[k], plan.bounds[k + 1])),
            plan.class_names,
            plan.attributes[k],
            options.resize,
            options.quality,
        )
        for k in todo
    )
    total, before = sum(sizes.values()), sum(sizes[k] for k in mine if k not in set(todo))
    with tqdm(total=total, initial=before, unit=" images", desc="packing", disable=True if quiet else None) as bar:
        if len(todo) >= 2 * options.workers > 2:
            # Whole shards to each process: images need not travel between processes.
            for job, path in zip(todo, in_processes(_write_alone, jobs, options.workers), strict=True):
                bar.update(sizes[job])
                yield path, False
        else:
            for one in jobs:
                yield _write_shard(one, options.workers, bar.update), False


def _finished(path: Path, wanted: str) -> bool:
    """Whether this shard of the packing was written before: verified then, and under its name only when whole."""
    return any(p.exists() and _attribute(p, "set") == wanted for p in (staged_path(path), path))


def _write_alone(job: _Job) -> Path:
    return _write_shard(job, 0, lambda images: None)


def _write_shard(job: _Job, workers: int, progress: Callable[[int], object]) -> Path:
    bad: list[tuple[str, str]] = []
    changes: Counter[str] = Counter()
    with (
        ShardWriter(job.path, job.class_names, job.attributes) as writer,
        check_items(job.items, job.resize, job.quality, workers) as checked,
    ):
        for item, result in zip(job.items, checked, strict=True):
            progress(1)
            if isinstance(result, str):
                bad.append((item.key, result))
                continue
            changes.update([result.change] if result.change else [])
            writer.add(Record(result.data, item.key, item.label, result.height, result.width, item.group))
        writer.finish({"left_out": json.dumps(bad), "re_encoded": json.dumps(changes)})
        writer.stage()
    return job.path


def _publish(shards: list[tuple[Path, bool]], source: str, dest: Path) -> Report:
    """Give the finished shards their names."""
    opened = [
        Pack.open(path if not staged_path(path).exists() else staged_path(path), alone=True) for path, _ in shards
    ]
    bad = tuple(tuple(each) for one in opened for each in json.loads(one.attributes["left_out"]))
    changes = sum((Counter(json.loads(one.attributes["re_encoded"])) for one in opened), Counter())
    records = sum(map(len, opened))
    if not records:
        for path, _ in shards:
            staged_path(path).unlink(missing_ok=True)
        raise UserError(f"none of the {len(bad):,} images of {source} decodes, such as {bad[0][0]}: {bad[0][1]}")
    for path, _ in shards:
        if staged_path(path).exists():
            os.replace(staged_path(path), path)
    for stale in set(existing_shards(dest)) - {path for path, _ in shards}:
        stale.unlink()
    return Report(records, bad, dict(changes), sum(resumed for _, resumed in shards))


def _check_destination(dest: Path, options: Options) -> None:
    if options.shards < 1 or options.workers < 0 or (options.resize is not None and options.resize < 1):
        raise UserError("--shards and --resize must be 1 or more, --workers 0 or more")
    if not 1 <= options.quality <= 95:
        raise UserError(f"--quality is {options.quality}; JPEG has 1 to 95")
    if dest.is_dir():
        raise UserError(f"{dest} is a folder; name the pack itself, such as {dest / 'train.h5'}")
    there = existing_shards(dest)
    if there and not options.force:
        raise UserError(f"{there[0]} exists; remove it, choose another name, or replace it with --force")


def _check_listing(listing: Listing, source: str, options: Options) -> None:
    table = listing.table
    if not len(table):
        raise UserError(f"nothing of {source} is left to pack with part {options.part!r} and these classes")
    if len(table) < options.shards:
        raise UserError(f"{len(table):,} images cannot fill {options.shards} shards; take fewer shards")
    keys = np.sort(table.keys)
    twice = keys[1:][keys[1:] == keys[:-1]]
    if len(twice):
        raise UserError(f"{source} has two samples named {twice[0].decode()}; names must be unique")


def _tools() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("numpy", "h5py", "pillow")}
    return {"python": platform.python_version(), **packages}
