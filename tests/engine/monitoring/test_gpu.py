import math
import sys
from types import SimpleNamespace

import pytest
import torch

from engine.monitoring.gpu import FIGURES, Gpu


class NVMLError(Exception):
    pass


def pretended(monkeypatch, **more):
    """A driver that tells of one GPU, by its own name for it."""

    def by_uuid(uuid):
        if uuid != "GPU-1234":
            raise NVMLError
        return "handle"

    said = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetClockInfo": lambda handle, kind: {"sm": 1200}[kind],
        "nvmlDeviceGetMaxClockInfo": lambda handle, kind: {"sm": 1980}[kind],
        "nvmlDeviceGetPowerUsage": lambda handle: 690_500,
        "nvmlDeviceGetTemperature": lambda handle, kind: {"gpu": 84}[kind],
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0x20,
    } | more
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(
        NVML_CLOCK_SM="sm", NVML_TEMPERATURE_GPU="gpu", NVMLError=NVMLError, **said))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    return Gpu(torch.device("cuda", 3)).figures()


def test_what_the_driver_says(monkeypatch):
    assert pretended(monkeypatch) == {
        "clock": 1200, "most_clock": 1980, "power": 690.5, "temperature": 84, "throttled": 1}  # fmt: skip


@pytest.mark.parametrize(("reasons", "slowed"), [(0, 0), (0x1, 0), (0x4, 0), (0x8, 1), (0x40, 1), (0x84, 1)])
def test_heat_and_power_supply_slow_down_and_a_power_limit_does_not(monkeypatch, reasons, slowed):
    asked = {"nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: reasons}
    assert pretended(monkeypatch, **asked)["throttled"] == slowed


def test_what_it_does_not_tell_is_nan(monkeypatch):
    def refuse(*given):
        raise NVMLError

    found = pretended(monkeypatch, nvmlDeviceGetPowerUsage=refuse)
    assert math.isnan(found["power"])
    assert found["clock"] == 1200
    assert all(map(math.isnan, pretended(monkeypatch, nvmlInit=refuse).values()))


def test_without_a_gpu_or_the_package_there_are_no_figures(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    for device in ("cpu", "cuda"):
        found = Gpu(torch.device(device)).figures()
        assert tuple(found) == FIGURES
        assert all(map(math.isnan, found.values()))


def test_the_package_has_what_is_asked_of_it():
    nvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    assert (nvml.NVML_CLOCK_SM, nvml.NVML_TEMPERATURE_GPU) == (1, 0)
    for name in ("Init", "DeviceGetHandleByUUID", "DeviceGetClockInfo", "DeviceGetMaxClockInfo", "DeviceGetPowerUsage",
                 "DeviceGetTemperature", "DeviceGetCurrentClocksThrottleReasons"):  # fmt: skip
        assert callable(getattr(nvml, f"nvml{name}"))
    assert nvml.nvmlClocksThrottleReasonHwSlowdown == 0x8
    assert nvml.nvmlClocksThrottleReasonSwThermalSlowdown == 0x20
