"""Audit mode, `train.reproducible=true`: the bits of weights, scores and logged losses do not depend on the number of
ranks, nor on where a run was broken off.

What that takes, besides the sum in one tree (`engine.optim.tree`): operators whose results do not vary, a network in
which a sample's place does not matter, and surroundings that stay the same from one part of a run to the next.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import nn

from engine import compiled
from engine.comm.communicator import Communicator, SharedError
from engine.config.data import DataConfig, TargetConfig
from engine.monitoring.metrics import processor
from loaders.errors import UserError
from loaders.pipelines.reading import choose_backend

Data = TypeVar("Data", DataConfig, TargetConfig)
ARITHMETIC = "arithmetic"  # what the description of a checkpoint has besides
_DECODERS = ("pillow", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
_NONE = "does not have a deterministic implementation"  # as torch says it


def prepare(device: torch.device) -> None:
    """Set torch's process-wide switches: operators whose results do not vary, or an error."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first call
        torch.backends.cudnn.benchmark = False  # chooses by the clock
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nobody reads it
    torch.set_deterministic_debug_mode("error")


@contextmanager
def told() -> Iterator[None]:
    """Encloses a step: an operator whose results vary ends the run on all ranks, which do the same, by its name."""
    try:
        yield
    except RuntimeError as error:
        if _NONE not in str(error):
            raise
        name = str(error).split(_NONE)[0].split()[-1]
        raise SharedError(
            f"reproducible=true: results of torch's operator {name} vary from time to time here; take another network, "
            "or another device"
        ) from error


def check_network(model: nn.Module, name: str) -> None:
    """UserError for a network that draws random numbers, or keeps statistics of what a rank has seen."""
    for where, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            fault = "keeps statistics of the batches that its rank has seen"
        elif getattr(module, "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "drop_prob", 0):
            fault = "drops at random, on each rank otherwise"
        else:
            continue
        raise UserError(f"reproducible=true: {where} of {name} {fault}; take a network of the BiT family")


def decoded_alike(config: Data) -> Data:
    """`config`, with images decoded where no other image has a say in how. UserError where it wants them elsewhere."""
    if config.decode in ("gpu", "mixed"):
        raise UserError(
            f"reproducible=true with data.decode={config.decode}: a GPU's decoders promise no pixel's bits; choose cpu"
        )
    return replace(config, decode="cpu")


def described(device: torch.device, micro_batch: int, backend: str) -> dict[str, Any]:
    """For the description of a checkpoint: what the bits of a run depend on, besides what any run has to go on with.

    micro_batch: images in one; backend: as data.backend.
    """
    gpu = device.type == "cuda"
    versions = {"torch": str(torch.__version__)}
    for name in _DECODERS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found = {
        "micro_batch": micro_batch,
        "device": torch.cuda.get_device_name(device) if gpu else processor(),
        "threads": None if gpu else torch.get_num_threads(),
        "extension": "built" if compiled.loaded() else "not built",
        "images by": choose_backend(backend),
        **versions,
    }
    return {ARITHMETIC: found}


def check_ranks(mine: Mapping[str, Any], comm: Communicator) -> None:
    """SharedError on all ranks, which call it together, where they do not compute alike."""
    for rank, other in enumerate(comm.exchange(dict(mine))):
        if said := _differences(other, mine):
            raise SharedError(f"reproducible=true: ranks {rank} and {comm.rank} differ: {said}. {_ADVICE}")


def check_resumed(found: Mapping[str, Any], mine: Mapping[str, Any], place: object) -> None:
    """UserError where a checkpoint's description `found` is not of a run that computes as `mine` does."""
    before = found.get(ARITHMETIC)
    if before is None:
        raise UserError(
            f"{place} was trained without reproducible=true: what comes of it depends on how many ranks it had; "
            "choose another folder=…"
        )
    if said := _differences(before, mine[ARITHMETIC]):
        raise UserError(f"reproducible=true: {place} was trained otherwise: {said}. {_ADVICE}")


_ADVICE = "Threads are those of OMP_NUM_THREADS; take the same machines, environment and micro-batches everywhere"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return "; ".join(f"{name} {before.get(name)}, and {now.get(name)} here" for name in names)
