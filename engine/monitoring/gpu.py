"""What the driver says of this rank's GPU: clock, power, temperature, and whether it is slowed down. Asked by NVML."""

from __future__ import annotations

import math
from typing import Any

import torch

FIGURES = ("clock", "most_clock", "power", "temperature", "throttled")
"""MHz now and at most; W; °C; 1 where heat or power supply slow it down, else 0."""
_SLOWED = 0x8 | 0x20 | 0x40 | 0x80
"""Of NVML's reasons for a clock: hardware slowdown, software and hardware thermal slowdown, power brake. To be at the
power limit, 0x4, is how a busy GPU runs."""


class Gpu:
    """One GPU. Where there is none, no package nvidia-ml-py, or a driver that does not tell, figures are NaN."""

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            # Not by number: CUDA_VISIBLE_DEVICES changes CUDA's, and NVML does not know of it.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except ImportError:
            return
        except pynvml.NVMLError:
            return
        self._nvml = pynvml

    def figures(self) -> dict[str, float]:
        """Each of `FIGURES`, NaN where it is not told."""
        nvml = self._nvml
        if nvml is None:
            return dict.fromkeys(FIGURES, math.nan)
        asked = {
            "clock": lambda: nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM),
            "most_clock": lambda: nvml.nvmlDeviceGetMaxClockInfo(self._handle, nvml.NVML_CLOCK_SM),
            "power": lambda: nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3,
            "temperature": lambda: nvml.nvmlDeviceGetTemperature(self._handle, nvml.NVML_TEMPERATURE_GPU),
            "throttled": lambda: bool(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle) & _SLOWED),
        }
        return {name: self._told(ask) for name, ask in asked.items()}

    def _told(self, ask: Any) -> float:
        try:
            return float(ask())
        except self._nvml.NVMLError:
            return math.nan
