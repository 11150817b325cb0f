"""`python -m engine.export RUN OUT [--onnx --torch --timm]`: a trained network for other programs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from engine import cli
from loaders.arguments import as_path, as_place, program
from loaders.output import as_command

ABOUT = """Write the network of a run for other programs, into the folder OUT, and compare it with what it was.

  python -m engine.export runs/tuned exported             all that can be
  python -m engine.export runs/tuned exported --onnx --images test.h5

  model.onnx (--onnx)    opset 21, for ONNX Runtime and others
  model.pt2 (--torch)    a program of torch.export: torch runs it without this project
  timm/ (--timm)         for timm.create_model("local-dir:OUT/timm", pretrained=True)

Without any of them: all that can be. Any number of images at a time; normalization is inside, but for timm's, which
has it in its transform; so is the calibration, where there is one (--calibration, or temperature.json in the run's
folder). Classes, image side and preprocessing are in the files, and README.md is a model card written from the run's
record.

RUN is a run's folder, of which it is the network that was scored, or a checkpoint's. Before OUT gets its name each file
is read back and run on real images: its answers are at most 1e-5 from the network's, in float32, or where rounding is
more in a network at most 4 times that; else nothing is written."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program("engine.export"), description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=as_place, metavar="RUN", help="a run's folder, or a checkpoint's")
    add("out", type=as_place, metavar="OUT", help="the folder to make")
    for form, what in (("onnx", "an ONNX file"), ("torch", "a program of torch.export"), ("timm", "a folder for timm")):
        add(f"--{form}", action="append_const", dest="forms", const=form, help=what)
    add("--images", type=as_place, metavar="PACK", help="images to compare on (those that the run was scored on)")
    add(
        "--calibration",
        type=as_path,
        metavar="FILE",
        help="what engine.evaluate --calibrate wrote: about.json",
    )
    add("--force", action="store_true", help="replace what was exported to OUT before")
    cli.guard(partial(_export, parser.parse_args(argv)))


def _export(given: argparse.Namespace) -> None:
    from engine.exporting.writing import export  # brings torch, which --help need not wait for

    say = partial(print, flush=True)
    export(
        given.run,
        given.out,
        given.forms or (),
        images=given.images,
        calibration=given.calibration,
        force=given.force,
        say=say,
    )
    print(f"{given.out}: compared, with a model card in README.md")


if __name__ == "__main__":
    as_command(main)
