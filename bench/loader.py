"""python -m bench.loader SOURCE: images per second of the pack, of what limits it, and of other loaders.

  python -m bench.loader imagenet-sample.tar --short-side 256
  python -m bench.loader sklearn:digits --turns 1 --batches 2 --only pack,torchvision     in seconds

All read the same images in turns within one run; each turn starts a loader anew, lets it deliver some batches, then
times a number of them. Only ratios within a run mean something.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.whole import write_json
from loaders.arguments import COUNT, SIDE, WORKERS, Number, as_path, as_picture, as_place
from loaders.errors import UserError
from loaders.output import as_command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m bench.loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("source", type=as_place, metavar="SOURCE", help="anything that loaders.pack takes, such as imagenet-sample.tar")
    add(
        "--short-side",
        action=Number,
        within=SIDE,
        metavar="N",
        help="pack with this --resize; the others read the same images",
    )
    add(
        "--quality",
        action=Number,
        within=(1, 95),
        default=95,
        help="of JPEGs that are encoded anew (default: %(default)s)",
    )
    add("--xray", action="store_true", help="the X-ray transform, beside torchxrayvision's loader")
    add("--batch", action=Number, within=COUNT, default=64, help="images (default: %(default)s)")
    add(
        "--threads",
        action=Number,
        within=WORKERS,
        default=len(os.sched_getaffinity(0)),
        help="or worker processes (default: %(default)s)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where the images end up (default: %(default)s)")
    add("--decode", choices=("auto", "cpu", "gpu", "mixed"), default="auto", help="where DALI decodes ours")
    add("--turns", action=Number, within=COUNT, default=7, help="(default: %(default)s)")
    add("--batches", action=Number, within=COUNT, default=16, help="timed in each turn (default: %(default)s)")
    add("--only", metavar="A,B,…", help="these loaders; names contain one of the words")
    add("--no-cold", action="store_true", help="leave out the pack with a cold page cache")
    add("--out", type=as_path, metavar="FILE.json", help="write the result")
    add("--plot", type=as_picture, metavar="FILE.png", help="draw it")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    try:
        options = parser().parse_args(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import torch  # this and some of these take seconds, which --help need not wait for

    from bench.measured import timing
    from bench.peers import loaders as loader_peers
    from bench.peers import turns
    from bench.peers import xray as loader_xray
    from loaders.pipelines import reading
    from loaders.pipelines.transform import natural_train, xray_train

    known = loader_peers.loaders()
    if options.xray:
        ours = {name: known[name] for name in (turns.CEILING, turns.OURS, turns.HOST) if name in known}
        known = {**ours, loader_xray.NAME: loader_xray.torchxrayvision_loader}
    transform = (xray_train if options.xray else natural_train)(loader_peers.SIZE)
    words = options.only.split(",") if options.only else [""]
    chosen = {name: known[name] for name in known if any(word in name for word in words)}
    if not chosen:
        print(f"error: --only {options.only} matches none of {', '.join(known)}", file=sys.stderr)
        return 2
    try:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: no GPU is visible to this process; run it on a GPU node, or --device cpu")
        reading.chosen(reading.Reading(device=options.device, decode=options.decode))
        with tempfile.TemporaryDirectory() as folder:
            how = {"batch": options.batch, "threads": options.threads, "transform": transform}
            how |= {"device": options.device, "decode": options.decode}
            material = loader_peers.prepare(options.source, Path(folder), options.short_side, options.quality, **how)
            hardware = timing.hardware(options.device)
            cold = turns.OURS in chosen and not options.no_cold
            done = turns.measure(material, chosen, options.turns, options.batches, 4, cold)
            what = f"{Path(options.source).name}" + (
                f" at short side {options.short_side}" if options.short_side else ""
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rates, compared = turns.report(done, options.threads), turns.ratios(done, turns.OURS) if turns.OURS in done else {}
    command = "python -m bench.loader " + " ".join(map(str, sys.argv[1:] if argv is None else argv))
    milliseconds = {name: timing.summarize(one.latencies) for name, one in done.items()}
    does = "X-ray transform" if options.xray else "random resized crop"
    facts = {"what": f"{does} to {loader_peers.SIZE} of {what}", "batch": options.batch}
    facts |= {"device": options.device, "decode": options.decode}
    result = timing.record(
        command,
        milliseconds,
        supports="loader",
        spread="lowest and highest of the turns; of milliseconds the 10th and 90th percentile",
        n=options.turns,
        **facts,
        threads=options.threads,
        loaders=rates,
        pack_relative_to=compared,
    )
    result["hardware"] = hardware
    result["versions"] |= loader_peers.versions()
    print(turns.table(rates, compared))
    if options.out:
        write_json(options.out, result)
    if options.plot:
        turns.plot(result, options.plot)
    return 0


if __name__ == "__main__":
    as_command(main)
