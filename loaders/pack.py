"""python -m loaders.pack: images in, packed HDF5 out."""

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from loaders.checking import check_items
from loaders.errors import UserError
from loaders.select import PARTS, keep_classes, split
from loaders.shard import Pack, existing_shards, shard_paths
from loaders.sources import Listing, find_source, kinds
from loaders.writer import Record, ShardWriter, new_attributes


@dataclass(frozen=True)
class Options:
    """How to pack; the fields are the command line's options."""

    kind: str | None = None
    """Kind of source; found from what is there when None."""
    under: str | None = None
    """Take this sub-tree of the source only."""
    classes: tuple[str, ...] = ()
    """Take these classes only, numbered in this order; empty: all."""
    part: str = "all"
    """all, train or test: a side of the deterministic split."""
    holdout: float = 0.2
    """Fraction of each class that is the test part."""
    shards: int = 1
    """Number of files."""
    resize: int | None = None
    """Re-encode images to this short side, in pixels, where they are larger."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that decode; 0: none but this one."""
    skip_bad: bool = False
    """Whether files that do not decode are acceptable: they are left out in any case."""
    force: bool = False
    """Replace an existing pack."""


@dataclass(frozen=True)
class Report:
    """What packing did."""

    records: int
    """Images in the pack."""
    bad: tuple[tuple[str, str], ...]
    """Key and reason of each file that did not decode."""
    changes: dict[str, int]
    """Images whose bytes are not those of the source, by reason."""


def pack(source: str, dest: str | Path, options: Options, *, quiet: bool = False) -> Report:
    """Pack a source into DEST.h5 or its shards without the files that do not decode, and verify what was written.

    Nothing appears under the final name before it is whole. Raises UserError for input that cannot be used.
    """
    dest = Path(dest)
    _check_destination(dest, options)
    module = find_source(source, options.kind)
    listing = module.listing(source, options.under)
    if options.classes:
        listing = keep_classes(listing, options.classes)
    listing = split(listing, options.part, options.holdout)
    _check_listing(listing, source, options)
    if listing.ignored and not quiet:
        print(f"ignored {len(listing.ignored):,} files that are not images, such as {listing.ignored[0]}")
    names = {"kind": module.KIND, "resize": options.resize or 0, "tools": json.dumps(_tools())}
    chosen = ("under", "classes", "part", *(("holdout",) if options.part != "all" else ()))
    choice = {name: getattr(options, name) for name in chosen if getattr(options, name)}
    common = {"source": source, **names, "selection": json.dumps(choice)}

    bounds = [round(k * len(listing.items) / options.shards) for k in range(options.shards + 1)]
    dest.parent.mkdir(parents=True, exist_ok=True)
    bad: list[tuple[str, str]] = []
    changes: Counter[str] = Counter()
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=len(listing.items), unit=" images", desc="packing", disable=True if quiet else None)
        )
        checked = stack.enter_context(check_items(listing.items, options.resize, options.workers))
        writers = []
        attributes = new_attributes(common, options.shards)
        for k, path in enumerate(shard_paths(dest, options.shards)):
            writer = stack.enter_context(ShardWriter(path, listing.class_names, attributes[k]))
            for item in listing.items[bounds[k] : bounds[k + 1]]:
                result = next(checked)
                bar.update()
                if isinstance(result, str):
                    bad.append((item.key, result))
                    continue
                changes.update([result.change] if result.change else [])
                writer.add(Record(result.data, item.key, item.label, result.height, result.width, item.group))
            writer.finish()
            writers.append(writer)
        records = sum(len(writer) for writer in writers)
        if not records:
            raise UserError(f"none of the {len(bad):,} images of {source} decodes, such as {bad[0][0]}: {bad[0][1]}")
        for writer in writers:
            writer.publish()
        for stale in set(existing_shards(dest)) - {writer.path for writer in writers}:
            stale.unlink()
    return Report(records, tuple(bad), dict(changes))


def _check_destination(dest: Path, options: Options) -> None:
    if options.shards < 1 or options.workers < 0 or (options.resize is not None and options.resize < 1):
        raise UserError("--shards and --resize must be 1 or more, --workers 0 or more")
    if dest.is_dir():
        raise UserError(f"{dest} is a folder; name the pack itself, such as {dest / 'train.h5'}")
    there = existing_shards(dest)
    if there and not options.force:
        raise UserError(f"{there[0]} exists; remove it, choose another name, or replace it with --force")


def _check_listing(listing: Listing, source: str, options: Options) -> None:
    if not listing.items:
        raise UserError(f"nothing of {source} is left to pack with part {options.part!r} and these classes")
    if len(listing.items) < options.shards:
        raise UserError(f"{len(listing.items):,} images cannot fill {options.shards} shards; take fewer shards")
    for before, item in zip(listing.items, listing.items[1:], strict=False):
        if before.key == item.key:
            raise UserError(f"{source} has two samples named {item.key}; names must be unique")


def _tools() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("numpy", "h5py", "pillow")}
    return {"python": platform.python_version(), **packages}


def _pack_command(argv: Sequence[str]) -> int:
    sources = "\n".join(f"  {name:10} {module.HELP}" for name, module in kinds().items())
    parser = argparse.ArgumentParser(
        prog="python -m loaders.pack",
        description="Pack images into HDF5 for training. Every image is decoded once, so a bad file is found now.",
        epilog=f"kinds of source:\n{sources}\n\nalso:\n"
        "  python -m loaders.pack verify PACK   check every record\n"
        "  python -m loaders.pack info PACK     say what is in a pack\n\n"
        "examples:\n"
        "  python -m loaders.pack ~/imagenet/train train.h5 --resize 256 --shards 8\n"
        "  python -m loaders.pack cifar10.tar cifar10-test.h5 --under cifar10/test\n"
        "  python -m loaders.pack sklearn:digits low.h5 --classes 0,1,2,3,4 --part train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Options()
    add = parser.add_argument
    add("source", metavar="SOURCE", help="what to pack, see below")
    add("dest", metavar="DEST.h5", help="the pack; with several shards DEST-00000-of-0000K.h5 and so on")
    add("--kind", help="kind of source (default: from what is there)")
    add("--under", metavar="SUBDIR", help="take this sub-tree of the source only")
    add("--classes", metavar="A,B,…", default="", help="take these classes only, numbered in this order")
    add(
        "--part",
        choices=PARTS,
        default=default.part,
        help="a side of a fixed, stratified split (default: all)",
    )
    add(
        "--holdout",
        metavar="F",
        type=float,
        default=default.holdout,
        help="the test part (default: %(default)s)",
    )
    add("--shards", metavar="K", type=int, default=default.shards, help="number of files (default: 1)")
    add(
        "--resize",
        metavar="N",
        type=int,
        help="re-encode larger images to short side N (default: bytes untouched)",
    )
    add(
        "--workers",
        metavar="N",
        type=int,
        default=default.workers,
        help="processes that decode (default: %(default)s)",
    )
    add("--skip-bad", action="store_true", help="files that do not decode are no error (they are left out in any case)")
    add("--force", action="store_true", help="replace an existing pack")
    fields = vars(parser.parse_args(argv))
    source, dest = fields.pop("source"), Path(fields.pop("dest"))
    classes = tuple(name.strip() for name in fields.pop("classes").split(",") if name.strip())

    started = time.perf_counter()
    options = Options(classes=classes, **fields)
    report = pack(source, dest, options)
    seconds = time.perf_counter() - started
    for key, reason in report.bad:
        print(f"bad: {key}: {reason}", file=sys.stderr)
    for change, count in sorted(report.changes.items()):
        print(f"re-encoded {count:,} images: {change}")
    left_out = f", {len(report.bad):,} bad files left out" if report.bad else ""
    rate = (report.records + len(report.bad)) / seconds
    print(f"{dest}: {report.records:,} images{left_out}, {seconds:.1f} s, {rate:,.0f} images/s, verified")
    if report.bad and not options.skip_bad:
        print(
            f"error: {len(report.bad):,} of {len(report.bad) + report.records:,} files do not decode and were left out;"
            " repair them and pack again with --force, or accept that with --skip-bad",
            file=sys.stderr,
        )
        return 1
    return 0


def _verify_command(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loaders.pack verify", description="Check every byte of a pack against its checksums."
    )
    parser.add_argument("pack", metavar="PACK", help="DEST.h5, of one file or several shards, or one shard")
    opened = Pack.open(parser.parse_args(argv).pack)
    with tqdm(total=len(opened), unit=" images", desc="verifying", disable=None) as bar:
        faults = opened.verify(bar.update)
    for fault in faults:
        print(fault)
    print(f"{opened.path}: {len(opened):,} records, {f'{len(faults):,} faults' if faults else 'sound'}")
    return 1 if faults else 0


def _info_command(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m loaders.pack info", description="Say what is in a pack.")
    parser.add_argument("pack", metavar="PACK", help="DEST.h5, of one file or several shards, or one shard")
    opened = Pack.open(parser.parse_args(argv).pack)
    for name, value in opened.attributes.items():
        print(f"{name:10} {value}")
    print(f"{'bytes':10} {opened.nbytes:,}, {opened.nbytes / max(len(opened), 1):,.0f} per image")
    if len(opened):
        low, middle, high = (np.quantile(opened.sizes, q, axis=0, method="nearest") for q in (0, 0.5, 1))
        print(f"{'height':10} {low[0]} to {high[0]}, median {middle[0]}")
        print(f"{'width':10} {low[1]} to {high[1]}, median {middle[1]}")
    print(f"{'classes':10} {len(opened.class_names)}")
    for name, count in zip(opened.class_names, opened.class_counts.tolist(), strict=True):
        print(f"{count:10,} {name}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 for bad images or faults found, 2 for an error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"verify": _verify_command, "info": _info_command}
    command = commands.get(argv[0]) if argv else None
    try:
        return command(argv[1:]) if command else _pack_command(argv)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


def _terminate(number, frame):
    raise KeyboardInterrupt  # a job's time limit, too, must leave no temporary files


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())
