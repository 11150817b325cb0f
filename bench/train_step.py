"""Speed of one process's training step: `python bench/train_step.py --model R50x1`.

Images/s (median and spread), forward, backward and optimizer, the share of the peak that the counted FLOPs make (MFU),
and peak memory. Synthetic images, or a pack. `--json FILE` holds a profile that bench/scaling.py --profile takes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.network import family
from engine.whole import json_text
from loaders.errors import UserError

USAGE_ERROR = 2


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python bench/train_step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--model", default="R50x1", help=f"{', '.join(family.MEMBERS)} (%(default)s)")
    add("--batch", type=int, default=32, help="images per step (%(default)s)")
    add("--size", type=int, default=224, help="side of the images, pixels (%(default)s)")
    add("--classes", type=int, default=1000, help="outputs of the head (%(default)s)")
    add("--precision", choices=("fp32", "tf32", "bf16", "fp16"), help="bf16 on GPUs, fp32 on CPUs")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(%(default)s)")
    add("--data", default="synthetic", help="synthetic, or a pack (%(default)s)")
    add("--threads", type=int, default=2, help="decoding threads, for a pack (%(default)s)")
    add("--warmup", type=int, default=5, help="steps that do not count (%(default)s)")
    add("--steps", type=int, default=10, help="steps of a repeat (%(default)s)")
    add("--repeats", type=int, default=5, help="repeats: median and spread are of these (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all of it")
    return result


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    arguments = parser().parse_args(argv)
    try:
        family.member(arguments.model)
        from bench.measured.step import describe, run  # brings torch, which --help need not wait for

        result = run(arguments)
        print(describe(result))
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json_text(result, indent=1) + "\n")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)


if __name__ == "__main__":
    main()
