"""What `bench/kernel.py` measures: a step of AGC-SGD beside other optimizers, and beside what the memory allows.

All work on the same parameters and gradients, interleaved in one run; each has its own momentum. The bound is the time
in which a copy, measured in the same run, moves the 20 bytes a parameter that a step with momentum must move: read
parameter, gradient, momentum, write parameter and momentum. On a GPU times are the device's own, with the host ahead
of it, as in training; how long the host takes is listed beside them. `standardizing` is the step that also does the
backward pass of weight standardization, and writes standardized bf16 kernels for the next forward pass: 2 bytes more.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.measured import timing
from engine import compiled
from engine.network import bit
from engine.optim.agc_sgd import AgcSgd
from engine.optim.flat import FlatParameters
from engine.optim.groups import named_groups
from engine.optim.standardized import StandardizedWeights
from loaders.errors import UserError

BYTES = 20
"""Per parameter: 4 each of parameter, gradient and momentum read, of parameter and momentum written."""
SGD: dict[str, Any] = {"lr": 1e-5, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
AGC: dict[str, Any] = {"clipping": 0.01, "eps": 1e-3}
COPY = "copy"
PEER = "torch fused, no clipping"
OURS = "AgcSgd fused"


@dataclass(frozen=True)
class Subject:
    """A network whose parameters and gradients are views of flat buffers, with gradients of which AGC clips some."""

    model: nn.Module
    flat: FlatParameters
    gradients: Tensor
    """What the gradient buffer is set to before each step: some peers clip in place."""
    separate: bool = False
    """Parameters and gradients are tensors of their own instead, as any other training loop has them."""

    @classmethod
    def build(cls, name: str, device: torch.device, separate: bool = False) -> Subject:
        with torch.device(device):
            torch.manual_seed(0)
            model = bit.build(name, 1000, zero_head=False)
        flat = FlatParameters(model, channels_last=True)
        gradients = torch.randn_like(flat.grads) * flat.values.abs().mean() * 0.01
        if separate:
            for parameter in model.parameters():
                grad = parameter.grad
                assert grad is not None
                parameter.data, parameter.grad = parameter.data.clone(), grad.clone()
        return cls(model, flat, gradients, separate)

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def body(self) -> list[nn.Parameter]:
        """What is clipped: all but the classifier."""
        return [p for name, p in self.model.named_parameters() if not name.startswith("head.conv")]

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.params)

    def restore(self) -> None:
        self.flat.grads.copy_(self.gradients)
        if self.separate:
            for slot, parameter in zip(self.flat.slots, self.flat.parameters, strict=True):
                assert parameter.grad is not None
                parameter.grad.copy_(self.flat.view(self.flat.grads, slot, channels_last=True))


def variants(subject: Subject) -> dict[str, Callable[[], Any]]:
    """A step of each optimizer that is installed, and the copy."""
    found: dict[str, Callable[[], Any]] = {}
    device = subject.flat.values.device
    if compiled.supports(device, "agc_sgd_"):
        found[OURS] = _ours(subject, "fused", **AGC)
        found["AgcSgd fused, no clipping"] = _ours(subject, "fused", clipping=None)
        if not subject.separate:  # the copies are views of a buffer
            weights = StandardizedWeights(subject.model, subject.flat, torch.bfloat16).forward_weights
            found["AgcSgd fused, standardizing"] = _ours(subject, "fused", forward_weights=weights, **AGC)
    found["AgcSgd foreach"] = _ours(subject, "foreach", **AGC)
    kinds = ("foreach", "fused")
    peers = {kind: torch.optim.SGD(subject.params, **{kind: True}, **SGD).step for kind in kinds}
    found |= {f"torch {kind}, no clipping": step for kind, step in peers.items()}
    if (clip := _timm_clip(subject)) is not None:
        found |= {f"timm AGC + torch {kind}": _both(clip, step) for kind, step in peers.items()}
    if (apex := _apex(subject)) is not None:
        found["apex FusedSGD, no clipping"] = apex
    found["eager loop with AGC"] = EagerLoop(subject).step
    source, target = torch.zeros_like(subject.flat.values), torch.zeros_like(subject.flat.values)
    found[COPY] = lambda: target.copy_(source)
    return found


def _ours(subject: Subject, implementation: str, **settings: Any) -> Callable[[], Any]:
    groups = named_groups(subject.model, SGD["weight_decay"])
    return AgcSgd(groups, implementation=implementation, **SGD | settings).step


def _timm_clip(subject: Subject) -> Callable[[], Any] | None:
    try:
        from timm.utils.agc import adaptive_clip_grad
    except ImportError:
        return None
    body = subject.body
    return lambda: adaptive_clip_grad(body, clip_factor=AGC["clipping"], eps=AGC["eps"])


def _apex(subject: Subject) -> Callable[[], Any] | None:
    """NVIDIA apex; another package has the same name, so its own module is asked for."""
    if subject.flat.values.device.type != "cuda":
        return None
    try:
        from apex.optimizers import FusedSGD
    except ImportError:
        return None
    return FusedSGD(subject.params, **SGD).step


def _both(first: Callable[[], Any], second: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call


class EagerLoop:
    """AGC and SGD as publications write them: a Python loop over parameters, operation by operation."""

    def __init__(self, subject: Subject) -> None:
        clipped = set(subject.body)
        self._params = [(p, p in clipped, torch.zeros_like(p)) for p in subject.params]

    @torch.no_grad()
    def step(self) -> None:
        for p, clipped, momentum in self._params:
            grad = p.grad
            assert grad is not None
            if clipped:
                limit = _unit_norm(p).clamp(min=AGC["eps"]) * AGC["clipping"]
                norm = _unit_norm(grad)
                grad = torch.where(norm > limit, grad * (limit / norm.clamp(min=1e-6)), grad)
            grad = grad.add(p, alpha=SGD["weight_decay"])
            momentum.mul_(SGD["momentum"]).add_(grad)
            p.add_(grad.add(momentum, alpha=SGD["momentum"]), alpha=-SGD["lr"])


def _unit_norm(x: Tensor) -> Tensor:
    dims = tuple(range(1, x.ndim)) if x.ndim > 1 else None
    return torch.linalg.vector_norm(x, dim=dims, keepdim=x.ndim > 1)


def launches(step: Callable[[], Any]) -> int:
    """Kernels and copies that a step starts on the GPU."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    on_gpu = [event for event in profile.events() if event.device_type.name == "CUDA"]
    # A range that someone named, such as torch's around each optimizer's step, shows on the GPU's time line too.
    return sum(not (event.is_user_annotation or event.name.startswith("Optimizer.")) for event in on_gpu)


def host_milliseconds(step: Callable[[], Any], repeats: int = 11) -> float:
    """Median time in which the host issues a step to a GPU that has nothing else to do."""
    taken = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


def rates(times: dict[str, timing.Times], numel: int) -> dict[str, dict[str, float]]:
    """GB/s, and the share of the bound that a copy sets, by medians."""
    bound = times[COPY].median * BYTES / 8
    return {
        name: {
            "gb_per_s": BYTES * numel / t.median / 1e6,
            "of_bound": bound / t.median,
            "times_bound": t.median / bound,
        }
        for name, t in times.items()
        if name != COPY
    }


def device(wanted: str) -> torch.device:
    """The device of a word: auto is a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else torch.device(wanted)


def run(model: str, device: torch.device, repeats: int, separate: bool = False) -> dict[str, Any]:
    """The measurement as a record for JSON; `separate`: parameters are tensors of their own.

    UserError for an unknown network or an absent device.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible to this process; run it on a GPU node, or with --device cpu")
    hardware = timing.hardware(device)  # before this run is itself the load
    subject = Subject.build(model, device, separate)
    steps = variants(subject)
    times = timing.measure(steps, repeats=repeats, device=device, between=subject.restore, queued=True)
    counts = host = None
    if device.type == "cuda":
        counts = {name: launches(step) for name, step in steps.items() if name != COPY}
        host = {name: host_milliseconds(step) for name, step in steps.items() if name != COPY}
    command = f"python -m bench.kernel --model {model} --device {device.type} --repeats {repeats}"
    facts: dict[str, Any] = {
        "model": model,
        "separate_tensors": separate,
        "parameters": subject.numel,
        "bytes_per_parameter": BYTES,
        "bound_milliseconds": times[COPY].median * BYTES / 8,
        "rates": rates(times, subject.numel),
        "launches_per_step": counts,
        "host_milliseconds": host,
        "ratios": ratios(times),
    }
    command += (" --separate" if separate else "") + " --json"
    return timing.record(command, times, supports="optimizer", device=device, **facts) | {"hardware": hardware}


def ratios(times: dict[str, timing.Times]) -> dict[str, float]:
    """How many times as long others take as ours, by medians."""
    if OURS not in times:
        return {}
    return {name: t.median / times[OURS].median for name, t in times.items() if name not in (OURS, COPY)}


def show(report: dict[str, Any]) -> str:
    """The record for people."""
    times = {name: timing.Times(**values) for name, values in report["milliseconds"].items()}
    where = report["hardware"].get("gpu", report["hardware"]["cpu"])
    separate = " in separate tensors" if report["separate_tensors"] else ""
    lines = [
        f"{report['model']}: {report['parameters']:,} parameters{separate}; {where}",
        timing.table(times, PEER),
        "",
    ]
    for name, rate in report["rates"].items():
        lines.append(f"{name:28}{rate['gb_per_s']:8.1f} GB/s {rate['of_bound']:7.0%} of the bound")
        if report["launches_per_step"] is not None:
            host = report["host_milliseconds"][name]
            lines[-1] += f"{report['launches_per_step'][name]:7d} launches, issued in {host:.3f} ms"
    lines.append(f"bound {report['bound_milliseconds']:.3f} ms: {BYTES} bytes a parameter at the rate of the copy")
    return "\n".join(lines)
