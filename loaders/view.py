"""The command line of the contact sheet: what the network will see of a pack."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from loaders.arguments import SEEDS, SIDE, Number, as_path, as_place, program
from loaders.errors import UserError, in_words
from loaders.output import as_command
from loaders.pipelines.reading import BACKENDS
from loaders.pipelines.transform import (
    bit_eval,
    bit_train,
    natural_eval,
    natural_train,
    xray_eval,
    xray_train,
)

ABOUT = """Draw a contact sheet of augmented samples of a pack with their labels, as PNG: what a network would see.

  python -m loaders.view digits.h5 --transform bit-eval --size 32     (python -m loaders.pack sklearn:digits digits.h5)
  python -m loaders.view train.h5 --transform natural-randaugment --count 64 --seed 1
  python -m loaders.view chest.h5 --transform xray-train --out sheet.png"""
TRANSFORMS = {
    "natural-train": lambda size: natural_train(size),
    "natural-randaugment": lambda size: natural_train(size, (2, 9)),
    "natural-eval": lambda size: natural_eval(size),
    "bit-train": lambda size: bit_train(round(size * 160 / 128), size),
    "bit-eval": lambda size: bit_eval(size),
    "xray-train": lambda size: xray_train(size),
    "xray-eval": lambda size: xray_eval(size),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program("loaders.view"), description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("pack", type=as_place, metavar="PACK", help="a pack: DEST.h5, of one file or several shards")
    add("--out", type=as_path, metavar="FILE.png", help="where the sheet goes (default: PACK.png)")
    add("--transform", choices=TRANSFORMS, default="natural-train", help="(default: %(default)s)")
    add("--size", action=Number, within=SIDE, default=224, help="side of each sample in pixels (default: %(default)s)")
    add("--count", action=Number, within=(1, 10_000), default=32, help="samples (default: %(default)s)")
    add("--columns", action=Number, within=(1, 1000), default=8, help="samples in a row (default: %(default)s)")
    add("--seed", action=Number, within=SEEDS, default=0, help="of order and augmentation (default: %(default)s)")
    add("--backend", choices=BACKENDS, default="auto", help="(default: %(default)s)")
    try:
        options = parser.parse_args(argv)
        from loaders.packs.shard import Pack  # these bring torch and HDF5, which --help need not wait for
        from loaders.pipelines.sheet import contact_sheet

        out = options.out or Path(options.pack).with_suffix(".png")
        transform = TRANSFORMS[options.transform](options.size)
        sheet = contact_sheet(
            Pack.open(options.pack),
            transform,
            count=options.count,
            columns=options.columns,
            seed=options.seed,
            backend=options.backend,
        )
        sheet.save(out, "PNG")
    except (UserError, OSError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        return 2
    print(f"{out}: {sheet.width} x {sheet.height} pixels")
    return 0


if __name__ == "__main__":
    as_command(main)
