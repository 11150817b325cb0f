"""What can be configured: frozen dataclasses with a comment per field, which `--help` prints."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from omegaconf import MISSING

from engine.config.data import DataConfig, TargetConfig
from engine.config.ranges import Section, number, number_or, numbers, one_of
from loaders.errors import UserError

PRECISIONS = ("bf16", "fp32", "tf32", "fp16")
AUTO = "auto"
SEEDS = {"at_least": 0, "below": 2**32}  # what NumPy takes


@dataclass(frozen=True)
class ModelConfig(Section):
    """The network."""

    PREFIX = "model."

    name: str = "R50x1"  # a member of the BiT family (engine/network/family.py), or timm/NAME
    num_classes: int | None = number(None, 1, 1_000_000)  # outputs of the head; none: the classes of the training pack
    weights: str | None = None  # start from these weights (any format of docs/weights.md); none: random
    channels_last: bool = True  # memory order of images and weights; the faster one on GPUs
    recompute: str = one_of("none", "norm", "unit")  # what the backward pass makes anew: less memory, more time


@dataclass(frozen=True)
class AgcSgdConfig(Section):
    """SGD with momentum and adaptive gradient clipping."""

    PREFIX = "optim."

    momentum: float = number(0.9, 0, below=1)  # of SGD
    nesterov: bool = True  # momentum that looks ahead
    weight_decay: float = number(1e-4, 0)  # L2, added to the gradient after clipping
    no_decay: str = one_of("none", "norm_bias")  # norm_bias: not norms and biases; none: all decay, as published
    clipping: float | None = number(0.01, above=0)  # of gradients, share of the weight's norm; none: no clipping
    eps: float = number(1e-3, above=0)  # smallest norm that a weight counts with in clipping
    implementation: str = one_of("auto", "fused", "foreach")  # fused: C++/CUDA kernel; auto: where built
    standardize: str = one_of("auto", "optimizer", "network")  # weights: once a step or each pass

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.standardize == "optimizer" and self.implementation == "foreach":
            raise UserError("optim.standardize=optimizer needs the fused optimizer; choose optim.implementation=fused")
        if self.nesterov and self.momentum == 0:
            raise UserError("optim.nesterov=true needs a momentum; for plain SGD set optim.nesterov=false too")


@dataclass(frozen=True)
class OptimConfig(AgcSgdConfig):
    """AGC-SGD whose learning rate follows the global batch."""

    base_lr: float = number(0.03, above=0)  # learning rate at `base_batch` images a step; linear in the global batch
    base_batch: int = number(256, 1)  # global batch that base_lr is meant for


@dataclass(frozen=True)
class ScheduleConfig(Section):
    """Length of the run and its learning-rate curve; an epoch is one pass over the training samples."""

    PREFIX = "schedule."

    kind: str = one_of("step", "cosine", "constant")  # step: divide by 10 at the milestones; cosine: to zero; constant
    epochs: float | None = number(90.0, above=0)  # length; or `steps`
    steps: int | None = number(None, 1, 2**40)  # length in steps; takes the place of `epochs`
    warmup_epochs: float = number(15.0, 0)  # linear rise from 0; or `warmup_steps`
    warmup_steps: int | None = number(None, 0)  # takes the place of `warmup_epochs`
    milestones: list[float] = numbers([30.0, 60.0, 80.0], 0, rising=True)  # epochs (steps where `steps` is set)
    factor: float = number(0.1, above=0, at_most=1)  # what a milestone multiplies by

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is None and self.steps is None:
            raise UserError("neither schedule.epochs nor schedule.steps is set: how long should it train?")


def _check_reproducible(step: TrainConfig | FinetuneConfig) -> None:
    of = step.PREFIX
    if step.reproducible and step.micro_batch in (None, AUTO):
        raise UserError(
            f"{of}reproducible=true adds up micro-batches of one size in one tree: say how many images one has, "
            f"{of}micro_batch=…, so that the most ranks that a step will ever have share them evenly"
        )
    if step.reproducible and step.graph == "on":
        raise UserError(f"{of}reproducible=true records no step as a CUDA graph; leave {of}graph=on away")


@dataclass(frozen=True)
class TrainConfig(Section):
    """The training step."""

    PREFIX = "train."

    global_batch: int = number(4096, 1, 2**31)  # images per step over all ranks
    accumulate: int = number(1, 1)  # micro-batches per step on each rank: divides the memory, same result
    micro_batch: str | None = number_or(AUTO, 1)  # images in one, instead: any number of ranks shares them; or tried
    reproducible: bool = False  # the same bits on 1, 2, 4, … ranks of as many threads; by a fixed micro_batch
    precision: str = one_of(*PRECISIONS)  # bf16, fp16: autocast; fp16 scales the loss; tf32: matrix units
    device: str = one_of("auto", "cpu", "cuda")  # auto: a GPU for each rank where there are any
    seed: int = number(0, **SEEDS)  # of weights, sample order and augmentation
    graph: str = one_of("auto", "on", "off")  # a step's device work as one CUDA graph; auto: where one rank can
    log_every: int = number(50, 1)  # steps between logged metrics: the only steps that wait for the device
    class_weights: str = one_of("none", "balanced")  # of the loss; balanced: against the classes' frequency
    eval_every: float = number(1.0, above=0)  # epochs between evaluations; the last step always has one
    checkpoint_every: int | None = number(None, 1)  # steps between checkpoints, besides one every epoch
    async_save: bool = True  # checkpoints are written while training goes on; false: it waits for the disk
    tracking: str = one_of("none", "wandb", "trackio")  # metrics go there, too; wandb stays offline (WANDB_MODE)
    keep: int = number(2, 1)  # newest checkpoints to keep
    keep_best: bool = False  # besides, in FOLDER/best, the one with the least validation loss (from=FOLDER/best)
    bad_steps: int | None = number(None, 0)  # in a row to skip, gradients not finite; none: 0, 20 in fp16

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_reproducible(self)


@dataclass(frozen=True)
class CommConfig(Section):
    """How ranks talk."""

    PREFIX = "comm."

    backend: str = one_of("auto", "horovod", "torch", "local")  # auto: Horovod, else torch; not launched: local
    slice_mib: float = number(32.0, above=0, at_most=2**20)  # MiB of gradients that travel at once
    gradients: str = one_of("fp32", "bf16")  # what travels; bf16: half the bytes, sums rounded (not over Horovod)
    timeout_s: float | None = number(300.0, 1)  # without progress, then all end; first step, saving, scoring: x6


@dataclass(frozen=True)
class PretrainConfig(Section):
    """Everything that defines a pre-training run."""

    name: str = MISSING  # of the run, and of its folder
    about: str = ""  # what the recipe reproduces, and what it should reach
    folder: str = "runs/${name}"  # where checkpoints, metrics and curves go
    resume: str = one_of("auto", "never")  # auto: go on from the newest checkpoint; never: refuse a used folder
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    comm: CommConfig = field(default_factory=CommConfig)


@dataclass(frozen=True)
class RuleConfig(Section):
    """Departures from the BiT-HyperRule; none: as the rule says."""

    PREFIX = "rule."

    steps: int | None = number(None, 1, 2**40)  # length
    stretch: bool = True  # with steps: milestones and warm-up keep their share; false: their steps
    mixup: float | None = number(None, 0)  # alpha of MixUp's beta distribution; 0: off
    timing: str = one_of("exact", "published")  # published: warm-up starts at lr / its steps, each ÷10 a step later


@dataclass(frozen=True)
class FinetuneConfig(Section):
    """Everything that defines a fine-tuning run: one target, one number of shots, one seed."""

    name: str = MISSING  # of the recipe, kept in result lines
    about: str = ""  # what the recipe is for
    from_: str = MISSING  # checkpoint, run folder or weights file to transfer; "random" for new weights
    source: str | None = None  # name of what is transferred, in results; none: that of the run or file
    shots: str = "full"  # training images per class; a share of all of them, such as 10%; or "full"
    seed: int = number(0, **SEEDS)  # of the shots drawn, the new head, order and augmentation
    folder: str | None = AUTO  # for curves and the tuned network; auto: beside results; none: the result line is all
    resume: str = one_of("auto", "never")  # auto: go on from the newest checkpoint; never: refuse a used folder
    results: str = "runs/finetune.jsonl"  # one line is appended per run
    batch: int = number(128, 1, 2**31)  # images per step over all ranks
    lr: float = number(0.001, above=0)  # learning rate after warm-up; not scaled with the batch
    model: str | None = None  # network, also timm/NAME; none: the one named in the checkpoint
    class_weights: str = one_of("none", "balanced")  # as for pre-training
    head: str = one_of("zero", "default")  # start of the new head; zero: as BiT; default: as PyTorch, and published
    precision: str = one_of(*PRECISIONS)  # as for pre-training
    device: str = one_of("auto", "cpu", "cuda")  # auto: a GPU for each rank where there are any
    channels_last: bool = True  # memory order of images and weights
    recompute: str = one_of("none", "norm", "unit")  # what the backward pass makes anew: less memory, more time
    accumulate: int = number(1, 1)  # micro-batches per step on each rank
    micro_batch: str | None = number_or(AUTO, 1)  # images in one, instead: any number of ranks shares them; or tried
    reproducible: bool = False  # the same bits on 1, 2, 4, … ranks of as many threads; by a fixed micro_batch
    graph: str = one_of("auto", "on", "off")  # a step's device work as one CUDA graph; auto: where one rank can
    log_every: int = number(20, 1)  # steps between logged metrics
    eval_every: int | None = number(None, 1)  # steps between evaluations, besides the one at the end
    keep_best: bool = False  # score the weights with the least loss on data.val, kept in FOLDER/best, not the last ones
    bad_steps: int | None = number(None, 0)  # in a row to skip, gradients not finite; none: 0, 20 in fp16
    checkpoint_every: int | None = number(None, 1)  # steps between checkpoints, besides the one at the end
    async_save: bool = True  # checkpoints are written while training goes on; false: it waits for the disk
    tracking: str = one_of("none", "wandb", "trackio")  # metrics go there, too; wandb stays offline (WANDB_MODE)
    folds: int | None = number(None, 2, 1000)  # cross-validation on data.train by group: so many runs, mean and spread
    fold: int | None = number(None, 0)  # this one of them only, from 0 on
    data: TargetConfig = field(default_factory=TargetConfig)
    rule: RuleConfig = field(default_factory=RuleConfig)
    optim: AgcSgdConfig = field(default_factory=lambda: AgcSgdConfig(weight_decay=0.0))
    comm: CommConfig = field(default_factory=CommConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        amount = re.fullmatch(r"(\d{1,9})|(\d{1,3}(?:\.\d{1,9})?)%", self.shots, re.ASCII)
        drawn = amount and (int(amount[1]) > 0 if amount[1] else 0 < float(amount[2]) <= 100)
        if self.shots != "full" and not drawn:
            raise UserError(f"shots={self.shots}: must be a number of images per class, a share (10%), or full")
        tested = {"data.test": self.data.test is not None, "data.holdout": self.data.holdout, "folds": self.folds}
        if len(said := [name for name, value in tested.items() if value]) > 1:
            raise UserError(f"{said[0]} and {said[1]} both say what to score on; leave one away (data.test=null)")
        if not said:
            raise UserError(
                "data.test=null leaves open what to score on: give a share of data.train, data.holdout=0.2, or folds=5"
            )
        if self.fold is not None and self.fold >= (self.folds or 0):
            raise UserError(f"fold={self.fold} of folds={self.folds or 'null'}; folds are counted from 0 on")
        if self.keep_best and (self.data.val is None or self.folder is None):
            raise UserError("keep_best=true needs data.val=…, a pack to choose by, and folder=…, a place for the best")
        _check_reproducible(self)
