"""`python -m bench.kernel`: a step of AGC-SGD beside other optimizers, and beside what the memory allows.

  python -m bench.kernel --model R50x1
  python -m bench.kernel --model R20x0.25-32px --repeats 5          in seconds

All work on the same parameters and gradients, interleaved in one run. The bound is the time in which a copy, measured
in the same run, moves the 20 bytes a parameter that a step with momentum must move.
`--op agc_adamw` measures AdamW with clipping, a moving average and bf16 copies beside torch's that has none of them.
`--op group_norm_relu` measures that operator at each shape of the network for 8 images of 224 pixels (128 on a GPU), in
bf16.
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
from loaders.arguments import COUNT, Number, as_place
from loaders.errors import UserError
from loaders.output import as_command

USAGE_ERROR = 2
OPERATORS = ("agc_sgd", "agc_adamw", "group_norm_relu")
OPTIMIZERS = OPERATORS[:2]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m bench.kernel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--op", default="agc_sgd", choices=OPERATORS, help="what is measured (%(default)s)")
    add("--model", default="R50x1", help="a network of the BiT family, such as R50x1 or R152x4 (%(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU, if there is one (%(default)s)")
    add("--repeats", action=Number, within=COUNT, default=30, help="timed steps of each variant (%(default)s)")
    add("--compiled", action="store_true", help="group_norm_relu: also what torch.compile makes of torch's")
    add(
        "--separate",
        action="store_true",
        help="agc_sgd, agc_adamw: parameters are tensors of their own, not views of one buffer",
    )
    add("--json", type=as_place, nargs="?", const="-", metavar="FILE", help="write the record to FILE, or print it")
    return result


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], Callable[[dict[str, Any]], str]]:
    """The record of an operator's measurement, and what shows it to people. UserError for what cannot be measured."""
    from bench.measured import adamw, kernel, norm  # bring torch, which --help need not wait for

    device = kernel.device(arguments.device)
    for option, ops in (("compiled", ("group_norm_relu",)), ("separate", OPTIMIZERS)):
        if getattr(arguments, option) and arguments.op not in ops:
            meant = " or ".join(ops)
            raise UserError(f"--{option} is for --op {meant}, found --op {arguments.op}; leave one of them out")
    if arguments.op in OPTIMIZERS:
        measured = kernel if arguments.op == "agc_sgd" else adamw
        return measured.run(arguments.model, device, arguments.repeats, separate=arguments.separate), measured.show
    return norm.run(arguments.model, arguments.repeats, device, compiled=arguments.compiled), norm.show


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    try:
        arguments = parser().parse_args(argv)
        report, show = measure(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)
    text = json_text(report, indent=1)
    if arguments.json == "-":
        print(text)
        return
    print(show(report))
    if arguments.json is not None:
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    as_command(main)
