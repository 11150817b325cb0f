"""The compiled library `engine._C`, which has the operators of `torch.ops.boosterbit`: whether it is there."""

from __future__ import annotations

import importlib
import importlib.util

import torch

HOW_TO_BUILD = "python setup.py build_ext --inplace (make env does it)"


def loaded() -> bool:
    """Whether the extension is built; loads it."""
    if importlib.util.find_spec("engine._C") is None:
        return False
    importlib.import_module("engine._C")
    return True


def supports(device: torch.device, operator: str) -> bool:
    """Whether the extension is built with a kernel of `boosterbit::operator` for this kind of device."""
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    return (
        device.type in keys
        and loaded()
        and torch._C._dispatch_has_kernel_for_dispatch_key(f"boosterbit::{operator}", keys[device.type])
    )
