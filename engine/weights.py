"""`python -m engine.weights convert FROM TO`: weights of BiT networks in the formats that people use, both ways."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine import cli
from engine.network.naming import WORDS
from loaders.arguments import as_place, program
from loaders.output import as_command

if TYPE_CHECKING:
    from engine.network.conversion import Written

ABOUT = """Convert weights of BiT networks between the formats that people use; both ways, tensor for tensor.

  .safetensors       ours: the names of the published PyTorch code
  .pth, .pth.tar     as the paper's models were published: a dict with the state dict as its entry 'model'
  .npz               the official BiT files of TensorFlow, in float32
  --to timm          timm's names, as .safetensors or .pth (by the ending), for timm's resnetv2_…_bit"""

EXAMPLES = """FROM is any of these, whatever its name, or a run's folder (its newest checkpoint) or a checkpoint's.

examples:
  python -m engine.weights convert runs/demo demo.safetensors                of a run: engine.pretrain --help makes one
  python -m engine.weights convert runs/imagenet1k_r50x1 r50x1.safetensors
  python -m engine.weights convert model.pth.tar model.safetensors          the paper's models
  python -m engine.weights convert BiT-M-R50x1.npz BiT-M-R50x1.pth.tar      for the published PyTorch code
  python -m engine.weights convert runs/chexpert_r50x1 timm.safetensors --to timm

then, with timm:
  model = timm.create_model("resnetv2_50x1_bit", num_classes=…)
  model.load_state_dict(safetensors.torch.load_file("timm.safetensors"))

The classifier comes along, whatever its classes. TO is read back and compared before it gets its name."""


def convert(source: str | Path, target: str | Path, form: str | None = None, *, force: bool = False) -> Written:
    """`engine.network.conversion.convert`, whose source may be a run's folder too: its newest checkpoint."""
    from engine.network import conversion, weights  # these bring torch, which --help need not wait for
    from engine.saving import checkpoint

    path = Path(source)
    runs = str(source) and path.is_dir() and not (path / weights.FOLDER_FILE).is_file()
    return conversion.convert(checkpoint.find(path) if runs else source, target, form, force=force)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog=program("engine.weights"), description=ABOUT, epilog=EXAMPLES, formatter_class=raw
    )
    commands = parser.add_subparsers(required=True, metavar="convert")
    command = commands.add_parser(
        "convert", help="write weights in another format", description=ABOUT, epilog=EXAMPLES, formatter_class=raw
    )
    command.add_argument("source", type=as_place, metavar="FROM", help="weights of any of these formats, or a folder")
    command.add_argument("target", type=as_place, metavar="TO", help="the file to write; its ending says the format")
    command.add_argument("--to", choices=WORDS, help="the format, where the ending does not say it")
    command.add_argument("--force", action="store_true", help="replace TO where it exists")
    given = parser.parse_args(argv)

    cli.guard(lambda: _convert(given))


def _convert(given: argparse.Namespace) -> None:
    from engine.network.conversion import summary

    print(summary(given.target, convert(given.source, given.target, given.to, force=given.force)))


if __name__ == "__main__":
    as_command(main)
