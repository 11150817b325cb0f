"""`python -m bench.kernel --model R50x1`: a step of AGC-SGD beside other optimizers, and beside what the memory allows.

All work on the same parameters and gradients, interleaved in one run. The bound is the time in which a copy, measured
in the same run, moves the 20 bytes a parameter that a step with momentum must move. `--json FILE` writes the record.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.whole import json_text
from loaders.errors import UserError

USAGE_ERROR = 2


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m bench.kernel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--model", default="R50x1", help="a network of the BiT family, such as R50x1 or R152x4 (%(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU, if there is one (%(default)s)")
    add("--repeats", type=int, default=30, help="timed steps of each variant (%(default)s)")
    add("--json", nargs="?", const="-", metavar="FILE", help="write the record to FILE, or print it")
    return result


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    arguments = parser().parse_args(argv)
    from bench.measured import kernel  # brings torch, which --help need not wait for

    try:
        report = kernel.run(arguments.model, kernel.device(arguments.device), arguments.repeats)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)
    text = json_text(report, indent=1)
    if arguments.json == "-":
        print(text)
        return
    print(kernel.show(report))
    if arguments.json is not None:
        Path(arguments.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
