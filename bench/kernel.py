"""`python -m bench.kernel --model R50x1`: a step of AGC-SGD beside other optimizers, and beside what the memory allows.

All work on the same parameters and gradients, interleaved in one run. The bound is the time in which a copy, measured
in the same run, moves the 20 bytes a parameter that a step with momentum must move.
`--op group_norm_relu` measures that operator at each shape of the network for 8 images of 224 pixels, in bf16.
`--json FILE` writes the record.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.whole import json_text
from loaders.errors import UserError

USAGE_ERROR = 2
OPERATORS = ("agc_sgd", "group_norm_relu")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m bench.kernel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--op", default="agc_sgd", choices=OPERATORS, help="what is measured (%(default)s)")
    add("--model", default="R50x1", help="a network of the BiT family, such as R50x1 or R152x4 (%(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU, if there is one (%(default)s)")
    add("--repeats", type=int, default=30, help="timed steps of each variant (%(default)s)")
    add("--json", nargs="?", const="-", metavar="FILE", help="write the record to FILE, or print it")
    return result


def measure(op: str, model: str, device: str, repeats: int) -> tuple[dict[str, Any], Callable[[dict[str, Any]], str]]:
    """The record of an operator's measurement, and what shows it to people. UserError for what cannot be measured."""
    from bench.measured import kernel, norm  # bring torch, which --help need not wait for

    if op == "agc_sgd":
        return kernel.run(model, kernel.device(device), repeats), kernel.show
    if device == "cuda":
        raise UserError("--op group_norm_relu: the operator is for the CPU; --device cpu measures it")
    return norm.run(model, repeats), norm.show


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    arguments = parser().parse_args(argv)
    try:
        report, show = measure(arguments.op, arguments.model, arguments.device, arguments.repeats)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)
    text = json_text(report, indent=1)
    if arguments.json == "-":
        print(text)
        return
    print(show(report))
    if arguments.json is not None:
        Path(arguments.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
