"""python -m loaders.view PACK: a contact sheet of augmented samples with their labels, as PNG."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from loaders.errors import UserError
from loaders.pipelines.reading import BACKENDS
from loaders.pipelines.transform import (
    bit_eval,
    bit_train,
    natural_eval,
    natural_train,
    xray_eval,
    xray_train,
)

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
    parser = argparse.ArgumentParser(prog="python -m loaders.view", description=__doc__)
    add = parser.add_argument
    add("pack", metavar="PACK", help="a pack: DEST.h5, of one file or several shards")
    add("--out", type=Path, metavar="FILE.png", help="where the sheet goes (default: PACK.png)")
    add("--transform", choices=TRANSFORMS, default="natural-train", help="(default: %(default)s)")
    add("--size", type=int, default=224, help="side of each sample in pixels (default: %(default)s)")
    add("--count", type=int, default=32, help="samples (default: %(default)s)")
    add("--columns", type=int, default=8, help="samples in a row (default: %(default)s)")
    add("--seed", type=int, default=0, help="of order and augmentation (default: %(default)s)")
    add("--backend", choices=BACKENDS, default="auto", help="(default: %(default)s)")
    options = parser.parse_args(argv)
    from loaders.packs.shard import Pack  # these bring torch and HDF5, which --help need not wait for
    from loaders.pipelines.sheet import contact_sheet

    out = options.out or Path(options.pack).with_suffix(".png")
    try:
        if options.size < 1:
            raise UserError(f"--size is {options.size}; it must be 1 or more")
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
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {sheet.width} x {sheet.height} pixels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
