"""Packing a source: shard by shard, on one node or over many, going on after a kill where it stopped."""

import importlib.metadata
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from loaders.errors import UserError
from loaders.lock import Lock
from loaders.packing.find import find_source, list_source
from loaders.packing.options import Options, Report
from loaders.packing.ranks import Alone
from loaders.packing.resuming import fingerprint, interrupted, is_finished, remove_leftovers
from loaders.packs.shard import Pack, existing_shards, shard_paths
from loaders.packs.writer import Record, ShardWriter, new_attributes, staged_path
from loaders.sources.checking import check_items, in_processes
from loaders.sources.listing import Listing, Table
from loaders.sources.names import as_text, typed
from loaders.sources.select import keep_classes, shuffled, split


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


def pack(
    source: str,
    dest: str | Path,
    options: Options,
    *,
    quiet: bool = False,
    ranks: Alone | None = None,
    listed: tuple[str, Listing] | None = None,
) -> Report:
    """Pack a source into DEST.h5 or its shards without the files that do not decode, and verify what was written.

    Nothing appears under the final name before all is whole. Finished shards of an interrupted packing of the same
    samples are kept. On several ranks each writes its share of the shards; all return the same report. `listed`: the
    kind of source and what it holds, where that is known (on rank 0).
    Raises UserError for input that cannot be used, on all ranks alike.
    """
    dest, ranks = Path(dest), ranks or Alone()
    quiet = quiet or ranks.rank > 0
    lock = Lock(dest.with_name(f".{dest.name}.lock"), str(dest), "wait for it, end it, or pack to another place")
    try:
        plan, *_ = _together(
            ranks, lambda: _plan(source, dest, options, quiet, lock, listed) if ranks.rank == 0 else None
        )
        written = _together(ranks, lambda: list(_write(plan, options, quiet, ranks)))
        shards = sorted(shard for part in written for shard in part)
        report, *_ = _together(ranks, lambda: _publish(shards, source, dest) if ranks.rank == 0 else None)
    finally:
        lock.release()
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


def _plan(
    source: str, dest: Path, options: Options, quiet: bool, lock: Lock, listed: tuple[str, Listing] | None
) -> _Plan:
    _check_destination(dest, options)
    options = replace(options, under=options.under and typed(options.under), classes=tuple(map(typed, options.classes)))
    if listed is None:
        module = find_source(source, options.kind)
        listed = module.KIND, list_source(module, source, options.under, options.settings)
    kind, listing = listed
    listing = replace(listing, items=listing.table)
    if options.classes:
        listing = keep_classes(listing, options.classes)
    listing = split(listing, options.part, options.holdout)
    _check_listing(listing, source, options)
    if options.shuffle:
        listing = shuffled(listing)
    for remark in () if quiet else listing.remarks:
        print(remark)
    names: dict[str, Any] = {
        "kind": kind,
        "resize": options.resize or 0,
        "quality": options.quality,
        "tools": json.dumps(_tools()),
    }
    chosen = ("under", "settings", "classes", "part", *(("holdout",) if options.part != "all" else ()), "shuffle")
    choice = {name: getattr(options, name) for name in chosen if getattr(options, name)}
    common = {"source": as_text(source), **names, "selection": json.dumps(choice)}
    if listing.private is not None:
        settings = {name: value for name, value in options.settings.items() if name not in listing.private}
        choice = {name: settings if name == "settings" else choice[name] for name in choice if name != "under"}
        common |= {"source": kind, "selection": json.dumps(choice)}
    common["plan"] = fingerprint(listing, {**common, "shards": options.shards})

    lock.take()
    _check_destination(dest, options)  # as whoever held it before has left it
    paths = shard_paths(dest, options.shards)
    attributes = new_attributes(common, options.shards)
    earlier = None if options.restart else interrupted(paths, common["plan"])
    if earlier:
        attributes = [{**each, "set": earlier} for each in attributes]
    bounds = [round(k * len(listing.table) / options.shards) for k in range(options.shards + 1)]
    remove_leftovers(dest, [staged_path(path) for path in paths] if earlier else [], earlier)
    return _Plan(paths, bounds, listing.table, listing.class_names, attributes)


def _write(plan: _Plan, options: Options, quiet: bool, ranks: Alone) -> Iterator[tuple[Path, bool]]:
    """Write this rank's shards; each one's path, and whether it was there before."""
    mine = range(ranks.rank, len(plan.paths), ranks.size)
    todo = [k for k in mine if not is_finished(plan.paths[k], plan.attributes[k]["set"])]
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
