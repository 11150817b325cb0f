"""fp32, tf32, bf16 or fp16: what runs in which, and the loss scaler that fp16 needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from engine.comm.communicator import Communicator
from engine.comm.device import choose_device
from loaders.errors import UserError

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Parameters and gradients stay fp32; `name` says how convolutions are computed on `device`."""

    name: str
    device: torch.device

    def __post_init__(self) -> None:
        if self.name == "tf32" and self.device.type != "cuda":
            raise UserError(f"precision tf32 needs an NVIDIA GPU, found {self.device.type}; choose fp32 or bf16")

    def prepare(self) -> None:
        """Set the process-wide switches of torch for fp32 and tf32."""
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = self.name == "tf32"
            torch.backends.cudnn.allow_tf32 = self.name == "tf32"
            torch.backends.cudnn.benchmark = True

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


def prepare_device(precision: str, device: str, comm: Communicator) -> Precision:
    """Take this rank's device, and set it up for a precision."""
    result = Precision(precision, choose_device(device, comm))
    result.prepare()
    return result
