"""fp32, tf32, bf16 or fp16: what runs in which, whether its bits may vary, and the loss scaler that fp16 needs."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from engine.comm.communicator import Communicator
from engine.comm.device import choose_device
from engine.training import reproducible
from loaders.errors import UserError

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Parameters and gradients stay fp32; `name` says how convolutions are computed on `device`."""

    name: str
    device: torch.device
    reproducible: bool = False  # see engine.training.reproducible

    def __post_init__(self) -> None:
        if self.name == "tf32" and self.device.type != "cuda":
            raise UserError(f"precision tf32 needs an NVIDIA GPU, found {self.device.type}; choose fp32 or bf16")

    def prepare(self) -> None:
        """Set the process-wide switches of torch, on a CPU those of its memory, too."""
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = self.name == "tf32"
            torch.backends.cudnn.allow_tf32 = self.name == "tf32"
            torch.backends.cudnn.benchmark = True
        else:
            keep_freed_memory()
        if self.reproducible:
            reproducible.prepare(self.device)

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        if self.name in _AUTOCAST:
            return torch.autocast(self.device.type, dtype=_AUTOCAST[self.name])
        return nullcontext()

    @property
    def compute_dtype(self) -> torch.dtype:
        """What convolutions compute with."""
        return _AUTOCAST.get(self.name, torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        """A loss scaler that does nothing except in fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def keep_freed_memory() -> None:
    """Tell glibc to use freed memory again, up to 2 GiB of it, instead of giving it back to the system.

    A step frees and takes the same activations as the one before it; given back, each page of them is taken anew, and
    zeroed, by a fault. Does nothing where there is another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_TOP_PAD, 64 << 20)


def bad_steps(wanted: int | None, precision: str) -> int:
    """How many steps in a row may be skipped: in fp16 some are, while the loss scaler looks for its scale."""
    return wanted if wanted is not None else 20 if precision == "fp16" else 0


def prepare_device(precision: str, device: str, comm: Communicator, *, reproducible: bool = False) -> Precision:
    """Take this rank's device, and set it up for a precision."""
    result = Precision(precision, choose_device(device, comm), reproducible)
    result.prepare()
    return result
