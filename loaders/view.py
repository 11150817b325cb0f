"""python -m loaders.view PACK: a contact sheet of augmented samples with their labels, as PNG."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from loaders.errors import UserError
from loaders.packs.shard import Pack
from loaders.pipelines.batches import BACKENDS, eval_batches, train_batches
from loaders.pipelines.order import EvalPlan, TrainPlan
from loaders.pipelines.transform import (
    Transform,
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
_LINE = 14  # pixels of a line of text
_GAP = 6


def contact_sheet(
    pack: Pack, transform: Transform, *, count: int, columns: int, seed: int, backend: str
) -> Image.Image:
    """The first `count` samples of an epoch as the network is given them, with class and key below each."""
    if count < 1 or columns < 1:
        raise UserError(f"{count} samples in {columns} columns: both must be 1 or more")
    count = min(count, len(pack))
    images, ids = _samples(pack, transform, count, seed, backend)
    mean, std = (torch.tensor(values)[:, None, None] for values in (transform.mean, transform.std))
    pixels = (255 * (images * std + mean)).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    columns = min(columns, count)
    rows, side = math.ceil(count / columns), transform.size
    wide, high = side + _GAP, side + 2 * _LINE + _GAP
    sheet = Image.new("RGB", (columns * wide + _GAP, rows * high + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (picture, record) in enumerate(zip(pixels, ids.tolist(), strict=True)):
        left, top = _GAP + i % columns * wide, _GAP + i // columns * high
        sheet.paste(Image.fromarray(picture), (left, top))
        for line, text in enumerate((_label(pack, record), pack.keys[record])):
            draw.text((left, top + side + line * _LINE), _fitting(text, side, font), fill="black", font=font)
    return sheet


def _samples(
    pack: Pack, transform: Transform, count: int, seed: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    pool = np.arange(len(pack))
    if transform.random:
        plan = TrainPlan(pool, global_batch=count, seed=seed)
        with train_batches(pack, plan, transform, last_step=1, backend=backend) as batches:
            (batch,) = next(batches)
    else:
        with eval_batches(pack, EvalPlan(pool, batch=count), transform, backend=backend) as batches:
            batch = next(batches)
    return batch.images, batch.ids


def _label(pack: Pack, record: int) -> str:
    label = pack.labels[record]
    if label.ndim == 0:
        return pack.class_names[label]
    named = zip(pack.class_names, label.tolist(), strict=True)
    return ", ".join(f"{name}?" if math.isnan(value) else name for name, value in named if value != 0) or "none"


def _fitting(text: str, width: int, font) -> str:
    """The end of the text that fits, since keys differ there."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("…" + text) > width:
        text = text[1:]
    return "…" + text


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
