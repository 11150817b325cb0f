"""What can be configured: frozen dataclasses with a comment per field, which `--help` prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from loaders.errors import UserError

NORMALIZE = ("half", "imagenet")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key}={value} is unknown; choose one of {', '.join(choices)}")


def _positive(key: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{key}={value}: must be greater than 0")


def _check_reading(config: DataConfig | TargetConfig) -> None:
    if not 0 <= config.check <= 1:
        raise UserError(f"data.check={config.check}: must be a share, 0 to 1")
    if config.bad_budget < 0:
        raise UserError(f"data.bad_budget={config.bad_budget}: must be 0 or more")


@dataclass(frozen=True)
class DataConfig:
    """Packs and how images become tensors."""

    train: Any = MISSING  # pack to train on; [a.h5,b.h5]: a superset, of the labels that all have
    val: Any = None  # pack or packs to evaluate on; none: no evaluation
    augment: str = "natural"  # natural: random resized crop; crop: resize, random crop; xray: affine; none
    size: int = 224  # side of the images that the network sees, pixels
    resize: int | None = None  # evaluation: short side before the centre crop; none: size * 256 / 224
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # natural: area of the crop, share of the image
    flip: bool = True  # mirror half of the training images
    randaugment: list[int] | None = None  # [N, M]: N operations of magnitude M (of 30)
    rotation: float = 45.0  # xray: largest angle, degrees
    translation: float = 0.15  # xray: largest shift, share of the side (published code: 0.25)
    zoom: list[float] = field(default_factory=lambda: [0.9, 1.1])  # xray: smallest and largest scale
    backend: str = "auto"  # auto: DALI where it is installed, else host; dali; host
    threads: int = 2  # decoding threads of each rank
    prefetch: int = 2  # batches decoded ahead
    shuffle: str = "full"  # full: any order; blocks: runs of neighbours, for file systems that hate random reads
    block: int = 256  # shuffle=blocks: neighbours per block
    window: int = 64  # shuffle=blocks: blocks that are mixed at a time; window * block >> global batch
    last: str = "wrap"  # an epoch's last batch; wrap: the next epoch's images follow; drop; fill: up with its first
    check: float = 0.0  # share of the images whose checksum is compared before decoding, 0 to 1
    bad_budget: int = 10  # unusable images that each rank may replace before it stops

    def __post_init__(self) -> None:
        _one_of("data.shuffle", self.shuffle, ("full", "blocks"))
        _one_of("data.last", self.last, ("wrap", "drop", "fill"))
        _one_of("data.augment", self.augment, ("natural", "crop", "xray", "none"))
        _one_of("data.backend", self.backend, ("auto", "dali", "host"))
        for key in ("size", "threads", "prefetch", "block", "window"):
            _positive(f"data.{key}", getattr(self, key))
        _check_reading(self)
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"data.scale={self.scale}: must be two shares of the area, 0 < smallest <= largest <= 1")
        if self.resize is not None and self.resize < self.size:
            raise UserError(f"data.resize={self.resize} is less than data.size={self.size}; nothing could be cropped")


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = "R50x1"  # a member of the BiT family: see engine/network/bit.py
    num_classes: int | None = None  # outputs of the head; none: the classes of the training pack
    weights: str | None = None  # start from these weights (any format of docs/weights.md); none: random
    channels_last: bool = True  # memory order of images and weights; the faster one on GPUs


@dataclass(frozen=True)
class AgcSgdConfig:
    """SGD with momentum and adaptive gradient clipping."""

    momentum: float = 0.9  # of SGD
    nesterov: bool = True  # momentum that looks ahead
    weight_decay: float = 1e-4  # L2, added to the gradient after clipping
    no_decay: str = "none"  # none: decay all parameters, as published; norm_bias: not those of norms and biases
    clipping: float | None = 0.01  # adaptive gradient clipping, share of the weight's norm; none: no clipping
    eps: float = 1e-3  # smallest norm that a weight counts with in clipping
    implementation: str = "auto"  # auto: fused where built; fused: C++/CUDA kernel; foreach: plain torch
    standardize: str = "auto"  # weights, in the fused optimizer (once a step) or the network (each pass); auto: fused

    def __post_init__(self) -> None:
        _one_of("optim.no_decay", self.no_decay, ("none", "norm_bias"))
        _one_of("optim.implementation", self.implementation, ("auto", "fused", "foreach"))
        _one_of("optim.standardize", self.standardize, ("auto", "optimizer", "network"))
        if self.standardize == "optimizer" and self.implementation == "foreach":
            raise UserError("optim.standardize=optimizer needs the fused optimizer; choose optim.implementation=fused")
        for key in ("momentum", "weight_decay"):
            if not getattr(self, key) >= 0:
                raise UserError(f"optim.{key}={getattr(self, key)}: must be 0 or more")
        if self.nesterov and self.momentum == 0:
            raise UserError("optim.nesterov=true needs a momentum; for plain SGD set optim.nesterov=false too")
        if self.clipping is not None:
            _positive("optim.clipping", self.clipping)
        _positive("optim.eps", self.eps)


@dataclass(frozen=True)
class OptimConfig(AgcSgdConfig):
    """AGC-SGD whose learning rate follows the global batch."""

    base_lr: float = 0.03  # learning rate at `base_batch` images a step; scales linearly with the global batch
    base_batch: int = 256  # global batch that base_lr is meant for

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("base_lr", "base_batch"):
            _positive(f"optim.{key}", getattr(self, key))


@dataclass(frozen=True)
class ScheduleConfig:
    """Length of the run and its learning-rate curve; an epoch is one pass over the training samples."""

    kind: str = "step"  # step: divide by 10 at the milestones; cosine: to zero; constant
    epochs: float | None = 90.0  # length; or `steps`
    steps: int | None = None  # length in steps; takes the place of `epochs`
    warmup_epochs: float = 15.0  # linear rise from 0; or `warmup_steps`
    warmup_steps: int | None = None  # takes the place of `warmup_epochs`
    milestones: list[float] = field(default_factory=lambda: [30.0, 60.0, 80.0])  # epochs (steps where `steps` is set)
    factor: float = 0.1  # what a milestone multiplies by

    def __post_init__(self) -> None:
        _one_of("schedule.kind", self.kind, ("step", "cosine", "constant"))
        if self.epochs is None and self.steps is None:
            raise UserError("neither schedule.epochs nor schedule.steps is set: how long should it train?")
        if sorted(self.milestones) != list(self.milestones):
            raise UserError(f"schedule.milestones={self.milestones}: must rise")
        _positive("schedule.steps" if self.steps is not None else "schedule.epochs", self.steps or self.epochs or 0)


@dataclass(frozen=True)
class TrainConfig:
    """The training step."""

    global_batch: int = 4096  # images per step over all ranks
    accumulate: int = 1  # micro-batches per step on each rank: divides the memory, same result
    precision: str = "bf16"  # fp32, tf32 (matrix units), bf16 or fp16 (autocast; fp16 scales the loss)
    device: str = "auto"  # auto: a GPU for each rank where there are any; cpu; cuda
    seed: int = 0  # of weights, sample order and augmentation
    log_every: int = 50  # steps between logged metrics: the only steps that wait for the device
    eval_every: float = 1.0  # epochs between evaluations; the last step always has one
    checkpoint_every: int | None = None  # steps between checkpoints, besides one every epoch
    keep: int = 2  # newest checkpoints to keep
    keep_best: bool = False  # besides, in FOLDER/best, the one with the least validation loss (from=FOLDER/best)

    def __post_init__(self) -> None:
        _one_of("train.precision", self.precision, PRECISIONS)
        _one_of("train.device", self.device, ("auto", "cpu", "cuda"))
        for key in ("global_batch", "accumulate", "log_every", "eval_every", "keep"):
            _positive(f"train.{key}", getattr(self, key))
        if self.checkpoint_every is not None:
            _positive("train.checkpoint_every", self.checkpoint_every)


@dataclass(frozen=True)
class CommConfig:
    """How ranks talk."""

    backend: str = "auto"  # auto: Horovod, else torch.distributed, alone where not launched; horovod; torch; local
    slice_mib: float = 32.0  # MiB of gradients that travel at once

    def __post_init__(self) -> None:
        _one_of("comm.backend", self.backend, ("auto", "horovod", "torch", "local"))
        _positive("comm.slice_mib", self.slice_mib)


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that defines a pre-training run."""

    name: str = MISSING  # of the run, and of its folder
    about: str = ""  # what the recipe reproduces, and what it should reach
    folder: str = "runs/${name}"  # where checkpoints, metrics and curves go
    resume: str = "auto"  # auto: go on from the newest checkpoint in the folder; never: refuse a folder in use
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    comm: CommConfig = field(default_factory=CommConfig)

    def __post_init__(self) -> None:
        _one_of("resume", self.resume, ("auto", "never"))


@dataclass(frozen=True)
class TargetConfig:
    """The data to transfer to; sizes follow the BiT-HyperRule unless given."""

    train: Any = MISSING  # pack to fine-tune on, or a list of packs
    test: Any = MISSING  # pack or packs to score on, all of it
    name: str | None = None  # of the target, in results; none: the pack's
    metric: str = "auto"  # auto: top-1 of one class per image, mean AUC of label vectors; mean_auc: of classes too
    normalize: str = "auto"  # auto: as in pre-training, where the checkpoint says it, else half (-1..1); imagenet
    augment: str = "crop"  # crop: resize, random crop, flip (BiT); xray: the X-ray transform at `size` (default 224)
    flip: bool = True  # mirror half of the training images
    size: int | None = None  # side that the network sees; none: by the rule
    resize: int | None = None  # side before the random crop; none: by the rule
    oversample: bool = False  # full shot: draw all classes equally often (the paper: Flowers-102 and COVIDx)
    backend: str = "auto"  # as for pre-training
    threads: int = 2  # decoding threads of each rank
    prefetch: int = 2  # batches decoded ahead
    check: float = 0.0  # share of the images whose checksum is compared before decoding, 0 to 1
    bad_budget: int = 10  # unusable images that each rank may replace before it stops

    def __post_init__(self) -> None:
        _check_reading(self)
        for key in ("size", "resize", "threads", "prefetch"):
            if getattr(self, key) is not None:
                _positive(f"data.{key}", getattr(self, key))
        _one_of("data.augment", self.augment, ("crop", "xray"))
        _one_of("data.metric", self.metric, ("auto", "mean_auc"))
        _one_of("data.normalize", self.normalize, ("auto", *NORMALIZE))
        _one_of("data.backend", self.backend, ("auto", "dali", "host"))


@dataclass(frozen=True)
class RuleConfig:
    """Departures from the BiT-HyperRule; none: as the rule says."""

    steps: int | None = None  # milestones and warm-up keep their share of the length
    mixup: float | None = None  # alpha of MixUp's beta distribution; 0: off

    def __post_init__(self) -> None:
        if self.steps is not None:
            _positive("rule.steps", self.steps)
        if self.mixup is not None and not self.mixup >= 0:
            raise UserError(f"rule.mixup={self.mixup}: must be 0 or more")


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that defines a fine-tuning run: one target, one number of shots, one seed."""

    name: str = MISSING  # of the recipe, kept in result lines
    about: str = ""  # what the recipe is for
    from_: str = MISSING  # checkpoint, run folder or weights file to transfer; "random" for new weights
    source: str | None = None  # name of what is transferred, in results; none: that of the run or file
    shots: str = "full"  # training images per class, or "full"
    seed: int = 0  # of the shots drawn, the new head, order and augmentation
    folder: str | None = None  # run folder, for curves and the tuned network; none: only the result line is kept
    resume: str = "auto"  # auto: go on from the newest checkpoint in the folder; never: refuse a folder in use
    results: str = "runs/finetune.jsonl"  # one line is appended per run
    batch: int = 128  # images per step over all ranks
    lr: float = 0.001  # learning rate after warm-up; not scaled with the batch
    model: str | None = None  # network; none: the one named in the checkpoint
    precision: str = "bf16"  # fp32, tf32, bf16, fp16
    device: str = "auto"  # auto: a GPU for each rank where there are any; cpu; cuda
    channels_last: bool = True  # memory order of images and weights
    accumulate: int = 1  # micro-batches per step on each rank
    log_every: int = 20  # steps between logged metrics
    checkpoint_every: int | None = None  # steps between checkpoints in the folder, besides the one at the end
    data: TargetConfig = field(default_factory=TargetConfig)
    rule: RuleConfig = field(default_factory=RuleConfig)
    optim: AgcSgdConfig = field(default_factory=lambda: AgcSgdConfig(weight_decay=0.0))
    comm: CommConfig = field(default_factory=CommConfig)

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("device", self.device, ("auto", "cpu", "cuda"))
        _one_of("resume", self.resume, ("auto", "never"))
        for key in ("batch", "lr", "accumulate", "log_every"):
            _positive(key, getattr(self, key))
        if self.checkpoint_every is not None:
            _positive("checkpoint_every", self.checkpoint_every)
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed}: must be 0 or more, and less than 2**32")
        if self.shots != "full" and not (self.shots.isdecimal() and int(self.shots) > 0):
            raise UserError(f"shots={self.shots}: must be a number of images per class, or full")
