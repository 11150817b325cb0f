"""`python -m engine.evaluate PREDICTIONS…`: scores of predictions with intervals, as tables and figures."""

from __future__ import annotations

import argparse
import dataclasses
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine import cli
from engine.config.schema import CommConfig
from loaders.arguments import SEEDS, Number, as_path, as_place, program
from loaders.errors import UserError, told
from loaders.output import as_command

if TYPE_CHECKING:
    from engine.comm.communicator import Communicator

ABOUT = """Score predictions: ROC AUC, AUPRC, sensitivity, specificity, accuracy, Brier score, calibration error (ECE).

  python -m engine.evaluate digits-predictions.csv --out evaluation      what engine.predict wrote
  python -m engine.evaluate runs/tuned test.h5 --out evaluation          predicts first, on any number of ranks
  python -m engine.evaluate ours.csv theirs.csv                          and what they differ by, on the same images
  python -m engine.evaluate test.csv --threshold-from val.csv            thresholds by Youden's index on other images
  python -m engine.evaluate test.csv --calibrate val.csv                 a temperature that is fitted on other images
  python -m engine.evaluate test.csv --by sex --table patients.csv       subgroups, and the gaps between them

Intervals are 95% percentiles of a bootstrap over groups (patients; images where there are none). All scores are from 0
to 1. --out writes scores.md, scores.csv, about.json and figures."""
FIGURES = ("png", "svg", "pdf")
_SHOWN = 40
"""Rows of a table that are printed; --out writes all."""


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    arguments = _parser().parse_args(argv)
    if arguments.sensitivity is not None and not arguments.threshold_from:
        raise UserError("--sensitivity says which threshold is chosen; --threshold-from FILE says on which predictions")
    if arguments.threshold is not None and arguments.threshold_from:
        raise UserError("--threshold gives the threshold that --threshold-from would choose; name one of the two")
    if (arguments.by is None) != (arguments.table is None):
        raise UserError("--by COLUMN and --table CSV belong together; name both")
    if arguments.bands is not None and arguments.by is None:
        raise UserError("--bands splits the column of --by; name that too, and its --table")
    if not Path(arguments.predictions[0]).is_dir():
        cli.guard(lambda: _evaluate(arguments, [Path(each) for each in arguments.predictions]))
        return
    for number in (signal.SIGTERM, signal.SIGUSR1):  # a time limit, too, must leave no temporary files
        signal.signal(number, signal.default_int_handler)
    cli.connected(lambda comm: _predicted(arguments, comm), CommConfig(timeout_s=None), "the same command begins anew")


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog=program("engine.evaluate"), description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("predictions", nargs="+", type=as_place, metavar="PREDICTIONS",
        help="a file of predictions, two that are compared, or RUN… SOURCE, as engine.predict takes them")  # fmt: skip
    add("--out", type=as_path, metavar="FOLDER", help="write tables and figures into it")
    add("--figures", choices=FIGURES, default="png", help="their format (%(default)s)")
    add("--threshold", action=Number, within=(0.0, 1.0), metavar="T", help="from this probability on a label is there")
    add("--threshold-from", type=as_path, metavar="FILE", action="append",
        help="choose a threshold of each label on other predictions of the network; twice for two")  # fmt: skip
    add("--sensitivity", action=Number, within=(0.0, 1.0), metavar="S",
        help="the highest threshold with this sensitivity, in place of Youden's index")  # fmt: skip
    add("--calibrate", type=as_path, metavar="FILE", action="append",
        help="fit a temperature on other predictions of the network, and apply it; twice for two")  # fmt: skip
    add("--by", metavar="COLUMN", help="also the scores of subgroups, by this column of --table")
    add("--table", type=as_path, metavar="CSV", help="what is known of images or patients")
    add("--bands", type=_bands, metavar="A,B,…", help="where bands of a number begin (20,40,60,80)")
    add("--resamples", action=Number, within=(100, 100_000), default=2000, help="(%(default)s)")
    add("--seed", action=Number, within=SEEDS, default=0, help="of the resamples (%(default)s)")
    return result


def _bands(text: str) -> list[float]:
    try:
        found = [float(each) for each in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)) or found != sorted(set(found)):
        raise argparse.ArgumentTypeError(f"{text!r}; expected rising numbers between commas, such as 20,40,60,80")
    return found


def _predicted(arguments: argparse.Namespace, comm: Communicator) -> None:
    """RUN… SOURCE: predict over all ranks, then evaluate on the first."""
    from engine.predict import beside
    from engine.predicting.run import predict

    *runs, source = arguments.predictions
    with comm.together():
        if not runs:
            raise UserError(f"{source} is a folder; expected files of predictions, or runs and what they predict on")
    file = arguments.out / "predictions.csv" if arguments.out else beside(source)
    predict([Path(run) for run in runs], source, file, comm)
    with comm.together():
        if comm.leads:
            _evaluate(arguments, [file])


def _evaluate(arguments: argparse.Namespace, files: Sequence[Path]) -> None:
    from engine.evaluating import report  # brings numpy, for which --help need not wait

    asked = report.Asked(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(report.Asked)})
    found = report.assess(files, asked, speaks=True)
    print(found.text(_SHOWN))
    if arguments.out is not None:
        with told(f"--out {arguments.out} cannot be written; name another folder"):
            written = found.save(arguments.out, arguments.figures)
        print(f"{arguments.out}: {', '.join(path.name for path in written)}")


if __name__ == "__main__":
    as_command(main)
