"""What `bench/kernel.py --op agc_adamw` measures: AdamW with all that `AgcAdamW` does beside it, and without.

All work on the same parameters and gradients, interleaved in one run; each has its own state. The peer is torch's fused
AdamW, which neither clips nor averages nor copies. The bound is the time in which a copy, measured in the same run,
moves what each step must move: AdamW reads four arrays and writes three, 28 bytes a parameter; the moving average is
read and written, 8 more; the bf16 copy is written, 2 more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.measured import timing
from bench.measured.kernel import AGC, COPY, Subject, launches
from engine import compiled
from engine.optim import AgcAdamW, named_groups
from engine.optim.fused import ForwardWeights
from loaders.errors import UserError

ADAMW: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
CLIP: dict[str, Any] = {"clipping": AGC["clipping"], "clip_eps": AGC["eps"]}
DECAY = 0.9999
STEP, AVERAGE, BF16 = 28, 8, 2
"""Bytes a parameter that AdamW, the average and the copy must move."""
OURS = "AgcAdamW fused"
PEER = "torch fused, no clipping, average or copy"
APART = "timm AGC + torch fused + average + copy"


def variants(subject: Subject) -> dict[str, tuple[Callable[[], Any], int]]:
    """A step of each, and the bytes a parameter that it must move."""
    found: dict[str, tuple[Callable[[], Any], int]] = {}
    if compiled.supports(subject.flat.values.device, "agc_adamw_"):
        found[OURS] = _ours(subject, ema_decay=DECAY, forward_weights=_copies(subject), **CLIP), STEP + AVERAGE + BF16
        found[f"{OURS}, no average"] = _ours(subject, forward_weights=_copies(subject), **CLIP), STEP + BF16
        found[f"{OURS}, no copy"] = _ours(subject, ema_decay=DECAY, **CLIP), STEP + AVERAGE
        found[f"{OURS}, no average or copy"] = _ours(subject, **CLIP), STEP
        found[f"{OURS}, no clipping, average or copy"] = _ours(subject, clipping=None), STEP
    found["AgcAdamW foreach, no copy"] = (
        _ours(subject, implementation="foreach", ema_decay=DECAY, **CLIP),
        STEP + AVERAGE,
    )
    found[PEER] = torch.optim.AdamW(subject.params, fused=True, **ADAMW).step, STEP
    if (apart := _apart(subject)) is not None:
        found[APART] = apart, STEP + AVERAGE + BF16
    source, target = torch.zeros_like(subject.flat.values), torch.zeros_like(subject.flat.values)
    found[COPY] = (lambda: target.copy_(source)), 8
    return found


def _ours(subject: Subject, **settings: Any) -> Callable[[], Any]:
    groups = named_groups(subject.model, ADAMW["weight_decay"])
    return AgcAdamW(groups, **ADAMW | {"implementation": "fused"} | settings).step


def _copies(subject: Subject) -> ForwardWeights:
    """In bf16; views of one buffer where the parameters are."""
    if subject.separate:
        return ForwardWeights({p: torch.zeros_like(p, dtype=torch.bfloat16) for p in subject.params})
    flat = subject.flat
    buffer = torch.zeros_like(flat.values, dtype=torch.bfloat16)
    places = zip(flat.slots, flat.parameters, strict=True)
    return ForwardWeights({p: flat.view(buffer, slot, channels_last=True) for slot, p in places})


def _apart(subject: Subject) -> Callable[[], Any] | None:
    """The same by what there is for it: four passes."""
    try:
        from timm.utils.agc import adaptive_clip_grad
    except ImportError:
        return None
    params: list[torch.Tensor] = [*subject.params]
    body = subject.body
    averages = [p.detach().clone() for p in params]
    copies = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params]
    step = torch.optim.AdamW(params, fused=True, **ADAMW).step

    @torch.no_grad()
    def all_four() -> None:
        adaptive_clip_grad(body, clip_factor=AGC["clipping"], eps=AGC["eps"])
        step()
        torch._foreach_lerp_(averages, params, 1 - DECAY)
        torch._foreach_copy_(copies, params)

    return all_four


def run(model: str, device: torch.device, repeats: int, separate: bool = False) -> dict[str, Any]:
    """The measurement as a record for JSON; `separate`: parameters are tensors of their own.

    UserError for an unknown network or an absent device.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible to this process; run it on a GPU node, or with --device cpu")
    hardware = timing.hardware(device)  # before this run is itself the load
    subject = Subject.build(model, device, separate)
    found = variants(subject)
    steps = {name: step for name, (step, _) in found.items()}
    times = timing.measure(steps, repeats=repeats, device=device, between=subject.restore, queued=True)
    byte = times[COPY].median / 8  # milliseconds for one of each parameter
    command = f"python -m bench.kernel --op agc_adamw --model {model} --device {device.type} --repeats {repeats}"
    counts = {name: launches(step) for name, step in steps.items()} if device.type == "cuda" else None
    return timing.record(
        command + (" --separate" if separate else "") + " --json",
        times,
        supports="optimizer",
        device=device,
        model=model,
        separate_tensors=separate,
        parameters=subject.numel,
        bytes_per_parameter={name: moved for name, (_, moved) in found.items()},
        gb_per_s={name: moved * subject.numel / times[name].median / 1e6 for name, (_, moved) in found.items()},
        of_bound={name: byte * moved / times[name].median for name, (_, moved) in found.items() if name != COPY},
        ratios={name: each.median / times[PEER].median for name, each in times.items() if name != COPY},
        launches_per_step=counts,
    ) | {"hardware": hardware}


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
    for name, share in report["of_bound"].items():
        moved, rate = report["bytes_per_parameter"][name], report["gb_per_s"][name]
        lines.append(f"{name:46}{moved:3d} bytes a parameter {rate:8.1f} GB/s {share:7.0%} of a copy's rate")
    return "\n".join(lines)
