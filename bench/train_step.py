"""Speed of one process's training step: `python bench/train_step.py`.

  python bench/train_step.py --model R50x1 --precision bf16 --peers
  python bench/train_step.py --model R20x0.25-32px --size 32 --batch 4 --repeats 2     in seconds

Images/s (median and spread), forward, backward and optimizer, the share of the peak that the counted FLOPs make (MFU),
and peak memory. Synthetic images, or a pack. `--json FILE` holds a profile that bench/scaling.py --profile takes.
`--peers` times whole steps of ours, of timm's BiT (eager, compiled) and of torchvision's ResNet with batch norm in
turns; `--ablate` ours with each of its switches turned.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.network import family
from engine.whole import write_json
from loaders.arguments import COUNT, SIDE, WORKERS, Number, as_path, as_place
from loaders.errors import UserError, in_words
from loaders.output import as_command

USAGE_ERROR = 2


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python bench/train_step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--model", default="R50x1", help=f"{', '.join(family.MEMBERS)} (%(default)s)")
    add("--batch", action=Number, within=COUNT, default=32, help="images per step (%(default)s)")
    add("--size", action=Number, within=SIDE, default=224, help="side of the images, pixels (%(default)s)")
    add("--classes", action=Number, within=COUNT, default=1000, help="outputs of the head (%(default)s)")
    add("--precision", choices=("fp32", "tf32", "bf16", "fp16"), help="bf16 on GPUs, fp32 on CPUs")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(%(default)s)")
    add("--data", type=as_place, default="synthetic", help="synthetic, or a pack (%(default)s)")
    add("--threads", action=Number, within=WORKERS, default=2, help="decoding threads, for a pack (%(default)s)")
    add("--warmup", action=Number, within=(0, 10**9), default=5, help="steps that do not count (%(default)s)")
    add("--steps", action=Number, within=COUNT, default=10, help="steps of a repeat (%(default)s)")
    add(
        "--repeats",
        action=Number,
        within=COUNT,
        default=5,
        help="repeats: median and spread are of these (%(default)s)",
    )
    add("--peers", action="store_const", dest="compare", const="peers", help="beside other libraries' steps, in turns")
    add("--ablate", action="store_const", dest="compare", const="ablate", help="with each switch of ours turned")
    add("--trace", type=as_place, metavar="FILE", help="with one of these two: the time line of one step, for Perfetto")
    add("--json", type=as_path, metavar="FILE", help="write all of it")
    return result


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What was asked for, and its text. UserError for what cannot be measured."""
    from bench.measured import compared, step  # bring torch, which --help need not wait for

    if arguments.compare is None:
        result = step.run(arguments)
        return result, step.describe(result)
    how = arguments.repeats, arguments.warmup, arguments.trace
    result = compared.run(step.setup_of(arguments), arguments.compare, *how)
    return result, compared.describe(result)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    try:
        arguments = parser().parse_args(argv)
        family.member(arguments.model)
        result, said = measure(arguments)
        print(said)
        if arguments.json:
            write_json(arguments.json, result)
    except BrokenPipeError:  # `… | head`
        raise
    except (UserError, OSError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        sys.exit(USAGE_ERROR)


if __name__ == "__main__":
    as_command(main)
