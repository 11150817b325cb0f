"""How batches are made, which changes nothing about what is in them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loaders.errors import UserError, unknown

if TYPE_CHECKING:
    import torch

BACKENDS = ("auto", "dali", "host")
DECODES = ("auto", "cpu", "gpu", "mixed")
REGIONS = ("auto", "slice", "whole")


@dataclass(frozen=True)
class Reading:
    """How batches are made; what is in them does not depend on it."""

    backend: str = "auto"
    """auto: DALI where it is installed; dali; host."""
    device: str | torch.device = "cpu"
    """Where the tensors come out."""
    decode: str = "auto"
    """Where images are decoded, resized and augmented. cpu: there, and bytes travel to the device; gpu: by DALI on the
    device; mixed: there too, but every other image is decoded on the CPU; auto: gpu where that is possible."""
    region: str = "auto"
    """What DALI decodes: slice: the window's pixels; whole: all, of which the window is cut; auto: whole on a GPU."""
    threads: int = 1
    """Decoding threads."""
    prefetch: int = 2
    """Batches made ahead."""
    check: float = 0.0
    """Share of the records whose bytes are compared with their checksum before decoding, 0 to 1."""
    bad_budget: int = 10
    """Different records that may turn out unusable before the run stops."""

    def __post_init__(self) -> None:
        if self.threads < 1 or self.prefetch < 1:
            raise UserError(f"{self.threads} threads and {self.prefetch} batches of prefetch: both must be 1 or more")
        if not 0 <= self.check <= 1 or self.bad_budget < 0:
            raise UserError(f"check {self.check} must be a share, 0 to 1; the budget {self.bad_budget} 0 or more")
        if self.decode not in DECODES:
            raise unknown("place of decoding", self.decode, DECODES)
        if self.region not in REGIONS:
            raise unknown("region of decoding", self.region, REGIONS)


def chosen(how: Reading) -> Reading:
    """`how` with what this machine has in place of `auto`. UserError for what it lacks."""
    backend, device = choose_backend(how.backend), str(how.device).partition(":")[0]
    possible = backend == "dali" and device == "cuda"
    if how.decode in ("gpu", "mixed") and not possible:
        raise UserError(
            f"data.decode={how.decode} takes DALI and a GPU, and this run has backend {backend} on device {device}; "
            "choose data.decode=cpu, or auto"
        )
    decode = ("gpu" if possible else "cpu") if how.decode == "auto" else how.decode
    return replace(how, backend=backend, decode=decode)


def choose_backend(backend: str) -> str:
    """`dali` or `host`. UserError when DALI is asked for and is not installed."""
    if backend not in BACKENDS:
        raise UserError(f"unknown input backend {backend!r}; there are {', '.join(BACKENDS)}")
    present = importlib.util.find_spec("nvidia.dali") is not None if _has_nvidia() else False
    if backend == "dali" and not present:
        raise UserError(
            "the DALI pipeline was asked for, but DALI is not installed; install it with"
            " `pip install nvidia-dali-cuda130` (or the build for your CUDA), or take backend 'host'"
        )
    return "dali" if present and backend != "host" else "host"


def _has_nvidia() -> bool:
    return importlib.util.find_spec("nvidia") is not None
