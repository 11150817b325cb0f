"""python -m loaders.pack: images in, packed HDF5 out."""

import argparse
import resource
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from loaders.arguments import SIDE, Number, as_path, as_place, as_settings, program
from loaders.errors import UserError, in_words
from loaders.output import as_command
from loaders.packing.find import kinds
from loaders.packing.options import Options, Report
from loaders.packing.ranks import Alone, MpiRanks
from loaders.packing.spreading import pack
from loaders.packs.shard import Pack
from loaders.sources.select import PARTS


def _pack_command(argv: Sequence[str]) -> int:
    sources = "\n".join(f"  {name:10} {module.HELP}" for name, module in kinds().items())
    parser = argparse.ArgumentParser(
        prog=program("loaders.pack"),
        description="Pack images into HDF5 for training. Every image is decoded once, so a bad file is found now.",
        epilog=f"kinds of source:\n{sources}\n\n{_settings_help()}also:\n"
        "  python -m loaders.pack verify PACK   check every record\n"
        "  python -m loaders.pack info PACK     say what is in a pack\n\n"
        "examples:\n"
        "  python -m loaders.pack sklearn:digits digits.h5\n"
        "  python -m loaders.pack ~/imagenet/train train.h5 --resize 256 --shards 8\n"
        "  python -m loaders.pack cifar10.tar cifar10-test.h5 --under cifar10/test\n"
        "  python -m loaders.pack sklearn:digits low.h5 --classes 0,1,2,3,4 --part train\n"
        "  srun -N 8 -n 8 python -m loaders.pack 'in21k/train-*' in21k.h5 --shards 1024 --shuffle --mpi\n\n"
        "A packing that was killed goes on with the unfinished shards when the same command is given again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Options()
    add = parser.add_argument
    add("source", type=as_place, metavar="SOURCE", help="what to pack, see below")
    add("dest", type=as_path, metavar="DEST.h5", help="the pack; with several shards DEST-00000-of-0000K.h5 and so on")
    add("--kind", help="kind of source (default: from what is there)")
    add("--under", metavar="SUBDIR", help="take this sub-tree (or part, such as train) of the source only")
    add("--set", metavar="KEY=VALUE", dest="settings", action="append", default=[], help="a setting, see below; repeat")
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
        action=Number,
        within=(0.0, 1.0),
        default=default.holdout,
        help="the test part (default: %(default)s)",
    )
    add("--shuffle", action="store_true", help="pack in a fixed random order (for training with data.shuffle=blocks)")
    add(
        "--shards",
        metavar="K",
        action=Number,
        within=(1, 99_999),
        default=default.shards,
        help="number of files (default: 1)",
    )
    add(
        "--resize",
        metavar="N",
        action=Number,
        within=SIDE,
        help="re-encode larger images to short side N (default: bytes untouched)",
    )
    add(
        "--quality",
        metavar="Q",
        action=Number,
        within=(1, 95),
        default=default.quality,
        help="of these JPEGs (default: %(default)s)",
    )
    add(
        "--workers",
        metavar="N",
        action=Number,
        within=(0, 1024),
        default=default.workers,
        help="processes that decode (default: %(default)s)",
    )
    add("--skip-bad", action="store_true", help="files that do not decode are no error (they are left out in any case)")
    add("--force", action="store_true", help="replace an existing pack")
    add("--restart", action="store_true", help="do not go on with the finished shards of an interrupted packing")
    add("--mpi", action="store_true", help="share the shards among the ranks of an MPI job (mpirun, srun)")
    fields = vars(parser.parse_args(argv))
    source, dest = fields.pop("source"), fields.pop("dest")
    classes = tuple(name.strip() for name in fields.pop("classes").split(",") if name.strip())

    started = time.perf_counter()
    options = Options(classes=classes, settings=as_settings(fields.pop("settings")), **fields)
    ranks = MpiRanks() if options.mpi else Alone()
    try:
        report = pack(source, dest, options, ranks=ranks)
    except (UserError, OSError) as error:
        nameless = isinstance(error, OSError) and not error.filename
        said = f"packing {source} into {dest}: {in_words(error)}" if nameless else in_words(error)
        return _failed(said, speaks=ranks.rank == 0)  # the same on all ranks
    except BaseException:  # on this rank alone: the others would wait for it
        if ranks.size > 1:
            traceback.print_exc()
            ranks.abort(1)
        raise
    seconds = time.perf_counter() - started
    return _summary(report, dest, options, seconds) if ranks.rank == 0 else _code(report, options)


def _settings_help() -> str:
    having = {name: module.SETTINGS for name, module in kinds().items() if hasattr(module, "SETTINGS")}
    rows = {
        name: "".join(f"  {key:16} {text}\n" for key, text in settings.items()) for name, settings in having.items()
    }
    return "".join(f"settings of {name}, each as --set KEY=VALUE:\n{text}\n" for name, text in rows.items())


def _failed(error: str, speaks: bool = True) -> int:
    if speaks:
        print(f"error: {error}", file=sys.stderr)
    return 2


def _code(report: Report, options: Options) -> int:
    return 1 if report.bad and not options.skip_bad else 0


def _summary(report: Report, dest: Path, options: Options, seconds: float) -> int:
    """Say what was packed; the exit code."""
    if report.resumed:
        print(f"{report.resumed:,} of {options.shards:,} shards were finished before, and kept")
    for key, reason in report.bad:
        print(f"bad: {key}: {reason}", file=sys.stderr)
    for change, count in sorted(report.changes.items()):
        print(f"changed {count:,} images: {change}")
    left_out = f", {len(report.bad):,} bad files left out" if report.bad else ""
    rate = (report.records + len(report.bad)) / seconds
    print(f"{dest}: {report.records:,} images{left_out}, {seconds:.1f} s, {rate:,.0f} images/s, verified")
    own, child = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"peak memory: {own:,.0f} MiB" + (f", and up to {child:,.0f} MiB in each worker" if options.workers else ""))
    if _code(report, options):
        print(
            f"error: {len(report.bad):,} of {len(report.bad) + report.records:,} files do not decode and were left out;"
            " repair them and pack again with --force, or accept that with --skip-bad",
            file=sys.stderr,
        )
    return _code(report, options)


def _verify_command(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{program('loaders.pack')} verify", description="Check every byte of a pack against its checksums."
    )
    parser.add_argument(
        "pack", type=as_place, metavar="PACK", help="DEST.h5, of one file or several shards, or one shard"
    )
    opened = Pack.open(parser.parse_args(argv).pack)
    with tqdm(total=len(opened), unit=" images", desc="verifying", disable=None) as bar:
        faults = opened.verify(bar.update)
    for fault in faults:
        print(fault)
    print(f"{opened.path}: {len(opened):,} records, {f'{len(faults):,} faults' if faults else 'sound'}")
    return 1 if faults else 0


def _info_command(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"{program('loaders.pack')} info", description="Say what is in a pack.")
    parser.add_argument(
        "pack", type=as_place, metavar="PACK", help="DEST.h5, of one file or several shards, or one shard"
    )
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
    except BrokenPipeError:  # `… | head`
        raise
    except (UserError, OSError) as error:
        return _failed(in_words(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the shards that were finished", file=sys.stderr)
        return 130


def _terminate(number: int, frame: object) -> None:
    raise KeyboardInterrupt  # a job's time limit, too, must leave no temporary files


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _terminate)
    as_command(main)
