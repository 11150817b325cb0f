"""What can be configured about data: of pre-training, and of the target of a fine-tuning run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from engine.config.ranges import Section, number, numbers, one_of
from loaders.errors import UserError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)
SIDE = (1, 8192)  # of images, pixels
WORKERS = (1, 1024)


@dataclass(frozen=True)
class DataConfig(Section):
    """Packs and how images become tensors."""

    PREFIX = "data."

    train: Any = MISSING  # pack to train on; [a.h5,b.h5]: a superset, of the labels that all have
    val: Any = None  # pack or packs to evaluate on; none: no evaluation
    holdout: float = number(0.0, 0, below=1)  # or: share of data.train to evaluate on instead of training
    overlap: str = one_of("warn", "allow")  # images that train and val share; warn: all of val's are an error
    augment: str = one_of("natural", "crop", "xray", "none")  # natural: resized crop; crop: random crop; xray: affine
    size: int = number(224, *SIDE)  # side of the images that the network sees, pixels
    resize: int | None = number(None, *SIDE)  # evaluation: short side before the centre crop; none: size * 256 / 224
    scale: list[float] = numbers([0.08, 1.0], above=0, at_most=1, length=2, rising=True)  # natural: area of the crop
    flip: bool = True  # mirror half of the training images
    randaugment: list[int] | None = numbers(None, 0, 30, length=2)  # [N, M]: N operations of magnitude M
    rotation: float = number(45.0, 0, 180)  # xray: largest angle, degrees
    translation: float = number(0.15, 0, 1)  # xray: largest shift, share of the side (published code: 0.25)
    zoom: list[float] = numbers([0.9, 1.1], above=0, at_most=16, length=2, rising=True)  # xray: smallest, largest scale
    outside: str = one_of("black", "reflect")  # xray: what lies outside a warped image; published: reflect
    downscale: str = one_of("linear", "area")  # linear: with antialiasing; area: means, as published for X-rays
    backend: str = one_of("auto", "dali", "host")  # auto: DALI where it is installed, else host
    decode: str = one_of("auto", "cpu", "gpu", "mixed")  # where; auto: on the GPU if DALI has one; mixed: half there
    region: str = one_of("auto", "slice", "whole")  # what DALI decodes: the window or all; auto: all on a GPU
    threads: int = number(2, *WORKERS)  # decoding threads of each rank
    prefetch: int = number(2, *WORKERS)  # batches decoded ahead
    shuffle: str = one_of("full", "blocks")  # blocks: runs of neighbours, for file systems that hate random reads
    block: int = number(256, 1)  # shuffle=blocks: neighbours per block
    window: int = number(64, 1)  # shuffle=blocks: blocks that are mixed at a time; window * block >> global batch
    last: str = one_of("wrap", "drop", "fill")  # an epoch's last batch; wrap: the next epoch's follow; fill: its first
    check: float = number(0.0, 0, 1)  # share of the images whose checksum is compared before decoding
    bad_budget: int = number(10, 0)  # unusable images that each rank may replace before it stops

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resize is not None and self.resize < self.size:
            raise UserError(f"data.resize={self.resize} is less than data.size={self.size}; nothing could be cropped")
        if self.holdout and self.val is not None:
            raise UserError("data.val and data.holdout both say what to evaluate on; leave one away")


@dataclass(frozen=True)
class TargetConfig(Section):
    """The data to transfer to; sizes follow the BiT-HyperRule unless given."""

    PREFIX = "data."

    train: Any = MISSING  # pack to fine-tune on, or a list of packs
    test: Any = MISSING  # pack or packs to score on, all of it; null: what `holdout` says
    holdout: float = number(0.0, 0, below=1)  # share of data.train to score on instead, to choose settings by
    val: Any = None  # pack or packs to evaluate on before that, or a share of data.train; none: data.test
    overlap: str = one_of("warn", "allow")  # images that train and test share; warn: all of test's are an error
    name: str | None = None  # of the target, in results; none: the pack's
    metric: str = one_of("auto", "mean_auc")  # auto: top-1 for one class per image, mean AUC for label vectors
    normalize: str = one_of("auto", "half", "imagenet")  # auto: as in pre-training if known, else half: -1..1
    augment: str = one_of("crop", "xray")  # crop: resize, random crop (BiT); xray: affine at `size` (default 224)
    flip: bool = True  # mirror half of the training images
    size: int | None = number(None, *SIDE)  # side that the network sees; none: by the rule
    resize: int | None = number(None, *SIDE)  # side before the random crop; none: by the rule
    aspect: str = one_of("square", "keep")  # crop: resized to a square (BiT); keep: its short side (published)
    translation: float = number(0.15, 0, 1)  # xray: largest shift, share of the side (published code: 0.25)
    outside: str = one_of("black", "reflect")  # as for pre-training
    downscale: str = one_of("linear", "area")  # as for pre-training
    oversample: bool = False  # full shot, shares: draw all classes equally often (paper: Flowers-102, COVIDx)
    backend: str = one_of("auto", "dali", "host")  # as for pre-training
    decode: str = one_of("auto", "cpu", "gpu", "mixed")  # as for pre-training
    region: str = one_of("auto", "slice", "whole")  # as for pre-training
    threads: int = number(2, *WORKERS)  # decoding threads of each rank
    prefetch: int = number(2, *WORKERS)  # batches decoded ahead
    check: float = number(0.0, 0, 1)  # share of the images whose checksum is compared before decoding
    bad_budget: int = number(10, 0)  # unusable images that each rank may replace before it stops

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_share is not None and not 0 < self.val_share < 1:
            raise UserError(
                f"data.val={self.val}: must be a pack, a list of packs, or a share of data.train, such as 0.1"
            )

    @property
    def val_share(self) -> float | None:
        """The share of `train` that is `val`, a number in any spelling; None where that is packs."""
        return float(self.val) if _NUMBER.fullmatch(str(self.val)) else None
