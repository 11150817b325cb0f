"""A contact sheet: samples as the network is given them, with their labels."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from loaders.errors import UserError
from loaders.packs.shard import Pack
from loaders.pipelines.batches import eval_batches, train_batches
from loaders.pipelines.order import EvalPlan, TrainPlan
from loaders.pipelines.transform import Transform

_LINE = 14  # pixels of a line of text
_GAP = 6


def contact_sheet(
    pack: Pack, transform: Transform, *, count: int, columns: int, seed: int, backend: str, side: int | None = None
) -> Image.Image:
    """The first `count` samples of an epoch as the network is given them, with class and key below each.

    side: of a sample on the sheet, pixels; None: as the network has it.
    """
    if count < 1 or columns < 1:
        raise UserError(f"{count} samples in {columns} columns: both must be 1 or more")
    count = min(count, len(pack))
    images, ids = _samples(pack, transform, count, seed, backend)
    mean, std = (torch.tensor(values)[:, None, None] for values in (transform.mean, transform.std))
    pixels = (255 * (images * std + mean)).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    columns = min(columns, count)
    rows, side = math.ceil(count / columns), side or transform.size
    wide, high = side + _GAP, side + 2 * _LINE + _GAP
    sheet = Image.new("RGB", (columns * wide + _GAP, rows * high + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (picture, record) in enumerate(zip(pixels, ids.tolist(), strict=True)):
        left, top = _GAP + i % columns * wide, _GAP + i // columns * high
        how = Image.Resampling.NEAREST if side > transform.size else Image.Resampling.LANCZOS
        sheet.paste(Image.fromarray(picture).resize((side, side), how), (left, top))
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
        return pack.class_names[label] if label >= 0 else "?"
    named = zip(pack.class_names, label.tolist(), strict=True)
    return ", ".join(f"{name}?" if math.isnan(value) else name for name, value in named if value != 0) or "none"


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The end of the text that fits, since keys differ there."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("…" + text) > width:
        text = text[1:]
    return "…" + text
