"""From configuration to the parts of a run: device, transforms, network, optimizer. Each function builds one part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import bit, checkpoint, weights
from engine.comm import Communicator
from engine.config import AgcSgdConfig
from engine.optim import AgcSgd, named_groups
from loaders.errors import UserError
from loaders.shard import Pack


def choose_device(wanted: str, comm: Communicator) -> torch.device:
    """This rank's device: the GPU of its local rank, or the CPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: no usable GPU is visible to this process; choose cpu, or check the job's GPUs")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # A launcher that binds GPUs shows each task its own as number 0.
    index = 0 if count == 1 and comm.local_rank > 0 and _bound() else comm.local_rank
    if index >= count:
        raise UserError(
            f"local rank {comm.local_rank} has no GPU: {count} visible on this node; start {count} tasks per node "
            "(--ntasks-per-node), or let each task see its own GPU (--gpus-per-task=1)"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _bound() -> bool:
    import os

    return "SLURM_GPUS_PER_TASK" in os.environ or "SLURM_TRES_PER_TASK" in os.environ


def check_labels(pack: Pack, num_classes: int, what: str) -> None:
    """UserError unless the pack's labels fit a head of `num_classes` outputs."""
    if pack.labels.ndim == 2:
        if pack.labels.shape[1] != num_classes:
            raise UserError(f"{what} pack {pack.path} has {pack.labels.shape[1]} labels, but the head {num_classes} outputs")
        return
    largest = int(pack.labels.max(initial=-1))
    if largest >= num_classes:
        raise UserError(
            f"{what} pack {pack.path} holds label {largest} ({len(pack.class_names)} classes), but the head has only "
            f"{num_classes} outputs; set model.num_classes={max(largest + 1, len(pack.class_names))} or leave it out"
        )


def same_classes(train: Pack, other: Pack) -> None:
    """UserError unless both packs number the same classes alike."""
    if train.class_names != other.class_names or train.labels.ndim != other.labels.ndim:
        only = sorted(set(other.class_names) ^ set(train.class_names))[:5]
        raise UserError(
            f"{other.path} does not have the classes of {train.path}: {len(other.class_names)} against "
            f"{len(train.class_names)}" + (f", differing in {', '.join(only)}" if only else ", in another order")
        )


def build_model(name: str, num_classes: int, seed: int) -> nn.Module:
    """A new network, random but for the seed, the same on all ranks and machines."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return bit.build(name, num_classes)


def read_weights(place: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and, where it is one of our checkpoints, its description; any format of engine/weights.py."""
    path = Path(place)
    if path.is_dir():
        folder = checkpoint.find(path)
        return weights.load(folder / checkpoint.WEIGHTS), checkpoint.describe(folder)
    return weights.load(path), {}


def build_optimizer(model: nn.Module, config: AgcSgdConfig, lr: float) -> AgcSgd:
    """AGC-SGD over the network's parameters, grouped by name: the head is not clipped."""
    return AgcSgd(
        named_groups(model, config.weight_decay, config.no_decay),
        lr=lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        clipping=config.clipping,
        eps=config.eps,
        implementation=config.implementation,
    )


def memory_use(device: torch.device) -> str:
    """Largest memory use of this process so far, for people."""
    import resource

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU, {host:.2f} GiB on the host"
    return f"{host:.2f} GiB"
