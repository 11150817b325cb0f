"""python -m bench.dicom: images per second of packing DICOM, beside a loop over pydicom that writes the same PNGs.

  python -m bench.dicom                                       2,048 pixels, 5 turns: minutes
  python -m bench.dicom --images 8 --side 256 --turns 1       the same in seconds

Both read the same made radiographs in turns within one run, the loop in one process; what they make is compared.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.whole import write_json
from loaders.arguments import COUNT, SIDE, WORKERS, Number, as_path
from loaders.output import as_command

OURS, PEER = "loaders.pack", "a loop over pydicom"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m bench.dicom", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--images", action=Number, within=COUNT, default=64, help="(default: %(default)s)")
    add("--side", action=Number, within=SIDE, default=2048, help="of each, pixels (default: %(default)s)")
    add("--syntax", choices=("explicit", "rle", "jpeg2000"), default="explicit", help="(default: %(default)s)")
    add("--workers", action=Number, within=WORKERS, default=2, help="of loaders.pack (default: %(default)s)")
    add("--turns", action=Number, within=COUNT, default=5, help="(default: %(default)s)")
    add("--json", type=as_path, metavar="FILE", help="write the result")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    options = parser().parse_args(argv)
    import numpy as np  # these take seconds, which --help need not wait for
    from PIL import Image

    from bench.measured import timing
    from bench.peers.dicom import plain_loop, write_radiographs
    from loaders.packing import Options, pack
    from loaders.packs.shard import Pack
    from loaders.sources.images import PNG_LEVEL

    rates: dict[str, list[float]] = {OURS: [], PEER: []}
    with tempfile.TemporaryDirectory() as place:
        source, pngs, dest = Path(place, "in"), Path(place, "png"), Path(place, "out.h5")
        secret, table = Path(place, "secret"), Path(place, "who.csv")
        secret.write_bytes(bytes(32))
        for folder in (source, pngs):
            folder.mkdir()
        paths = write_radiographs(source, options.images, options.side, options.syntax)
        hardware = timing.hardware()
        how = Options(workers=options.workers, force=True, settings={"secret": str(secret), "table": str(table)})
        work = {
            OURS: lambda: pack(str(source), dest, how, quiet=True),
            PEER: lambda: plain_loop(paths, pngs, PNG_LEVEL),
        }
        for turn in range(options.turns):
            for name in list(work)[:: 1 if turn % 2 else -1]:
                start = time.perf_counter()
                work[name]()
                rates[name].append(options.images / (time.perf_counter() - start))
                print(f"turn {turn + 1}: {name:20} {rates[name][-1]:7.2f} images/s", file=sys.stderr, flush=True)
        packed = Pack.open(dest)
        where = {line.split(",")[1]: line.split(",")[0] for line in table.read_text(encoding="utf-8").splitlines()[1:]}
        for k, key in enumerate(packed.keys):
            (pngs / "ours.png").write_bytes(packed.record(k).tobytes())
            ours, theirs = (np.asarray(Image.open(pngs / f"{name}.png"), int) for name in ("ours", where[key]))
            if np.abs(ours - theirs).max() > 1:  # a half may be rounded either way
                raise AssertionError(f"{where[key]}: another image than pydicom's")
        assert len(packed) == options.images
    ratios = [ours / theirs for ours, theirs in zip(rates[OURS], rates[PEER], strict=True)]
    compared = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "n": len(ratios)}
    result = timing.record(
        "python -m bench.dicom " + " ".join(map(str, sys.argv[1:] if argv is None else argv)),
        {name: timing.summarize([1e3 / rate for rate in each]) for name, each in rates.items()},
        supports="packing",
        spread="lowest and highest of the turns; of milliseconds, an image's, the 10th and 90th percentile",
        n=options.turns,
        what=f"{options.images} radiographs of {options.side} by {options.side} pixels, 12 bits, {options.syntax}",
        workers=options.workers,
        images_per_second={
            name: {"median": statistics.median(each), "low": min(each), "high": max(each)}
            for name, each in rates.items()
        },
        pack_relative_to_loop=compared,
    )
    result["hardware"] = hardware
    result["versions"] |= {name: metadata.version(name) for name in ("pydicom", "pillow")}
    for name, each in rates.items():
        print(f"{name:20} {statistics.median(each):7.2f} images/s ({min(each):.2f} to {max(each):.2f})")
    print(f"{OURS} is {compared['median']:.2f} ({compared['low']:.2f} to {compared['high']:.2f}) times as fast")
    if options.json:
        write_json(options.json, result)
    return 0


if __name__ == "__main__":
    as_command(main)
