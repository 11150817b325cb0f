"""`python -m engine.predict RUN… SOURCE [--out FILE]`: what trained networks say of images."""

from __future__ import annotations

import argparse
import re
import signal
from pathlib import Path

from engine import cli
from engine.comm.communicator import Communicator
from engine.config.schema import PRECISIONS, CommConfig
from loaders.arguments import WORKERS, Number, as_path, as_place, as_settings, program
from loaders.output import as_command

ABOUT = """Predict on images with a tuned network, or with several: then the mean of their probabilities.

  python -m engine.predict runs/tuned digits.h5                      → digits-predictions.csv (engine.finetune --help)
  python -m engine.predict runs/seed-* ward.csv --out ward.parquet   five seeds are an ensemble
  python -m engine.predict runs/tuned 'scans/*.png'
  srun -n 8 python -m engine.predict runs/tuned test.h5              on any number of ranks

A row for each image: key, group, the probability of each class or label (p:NAME), and the label where SOURCE has one
(label, or label:NAME). FILE.about.json says what it was made with. Images are prepared as for the scores of training.
SOURCE is a pack, or what `python -m loaders.pack` reads, labelled or not; that is packed beside FILE first, and the
pack removed. Many images are better packed once, on all nodes: python -m loaders.pack --mpi."""


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program("engine.predict"), description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=as_path, metavar="RUN", help="a run's folder, or that of a checkpoint")
    add("source", type=as_place, metavar="SOURCE", help="a pack, or images, see above")
    add("--out", type=as_path, metavar="FILE", help="CSV, or Parquet by its ending (SOURCE-predictions.csv)")
    add("--kind", help="kind of a SOURCE that is no pack (by what is there)")
    add("--under", metavar="SUBDIR", help="take this sub-tree or part of it only")
    add(
        "--set", metavar="KEY=VALUE", dest="settings", action="append", default=[], help="a setting of the kind; repeat"
    )
    add("--workers", metavar="N", action=Number, within=(0, 1024), help="processes that pack it (all cores)")
    add("--batch", metavar="N", action=Number, within=(1, 65536), default=64, help="images at once (%(default)s)")
    add("--precision", choices=PRECISIONS, help="(as each run was trained)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    add(
        "--threads",
        metavar="N",
        action=Number,
        within=WORKERS,
        default=2,
        help="that decode, of each rank (%(default)s)",
    )
    add("--backend", choices=("auto", "dali", "host"), default="auto", help="of decoding (%(default)s)")
    arguments = parser.parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # a time limit, too, must leave no temporary files
        signal.signal(number, signal.default_int_handler)
    cli.connected(lambda comm: _predict(arguments, comm), CommConfig(timeout_s=None), "the same command begins anew")


def _predict(arguments: argparse.Namespace, comm: Communicator) -> None:
    from engine.predicting.images import Choice  # brings torch, for which --help need not wait
    from engine.predicting.run import How, predict

    with comm.together():
        settings = as_settings(arguments.settings)
    choice = Choice(arguments.kind, arguments.under, settings, arguments.workers)
    how = How(arguments.batch, arguments.precision, arguments.device, arguments.threads, arguments.backend)
    predict(arguments.runs, arguments.source, arguments.out or beside(arguments.source), comm, choice, how)


def beside(source: str) -> Path:
    """Where predictions go unless something else is said: into this folder, named after the source."""
    name = re.sub(r"[*?\[\]{}]", "", source.rstrip("/").rpartition("/")[2].rpartition(":")[2])
    stem = name.rpartition(".")[0] if "." in name else name
    return Path(f"{stem.strip('.') or 'images'}-predictions.csv")


if __name__ == "__main__":
    as_command(main)
