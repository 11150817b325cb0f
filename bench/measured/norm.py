"""What `bench/kernel.py --op group_norm_relu` measures: group norm and ReLU at each shape of a network, in turns.

Forward and backward at once, channels-last, by the operator, by torch's GroupNorm and ReLU, by what torch.compile makes
of them where that is asked for, and by NVIDIA apex where it is installed. On a GPU the others run under autocast, and
answer in the input's dtype, as in training. The bound is the time in which a copy, measured in the same run, moves the
5 activations that must move: forward reads one and writes one, backward reads two and writes one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.measured import timing
from engine.network import bit, family, norm
from engine.training.precision import Precision
from loaders.errors import UserError

OURS, PEER, COPY = "operator", "torch GroupNorm + ReLU", "copy"
COMPILED, APEX = "torch.compile of them", "apex GroupNorm + ReLU"
MOVED = 5 / 2
"""Activations that must move, as copies, which move two."""


def shapes(model: str, size: int) -> Counter[tuple[int, int]]:
    """(channels, side) of the inputs of all norms of a network for images of `size` pixels, and how many have it."""
    found: Counter[tuple[int, int]] = Counter()

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[inputs[0].shape[1], inputs[0].shape[2]] += 1

    with torch.device("meta"):
        network = bit.build(model, 10)
        for module in network.modules():
            if isinstance(module, bit.GroupNormReLU):
                module.register_forward_pre_hook(note)
        network(torch.empty(1, 3, size, size))
    return found


def variants(
    channels: int, side: int, groups: int, batch: int, dtype: torch.dtype, device: torch.device, compiled: bool
) -> dict[str, Callable[[], Any]]:
    """A forward and backward pass of each, and the copy, on one input and one gradient."""
    generator = torch.Generator(device).manual_seed(0)
    x, grad = (
        torch.randn(batch, channels, side, side, generator=generator, device=device)
        .to(dtype)
        .to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    module = nn.GroupNorm(groups, channels).to(device)
    leaf, target = x.clone().requires_grad_(), torch.empty_like(x)

    def step(forward: Callable[[Tensor], Tensor], parameters: nn.Module) -> Callable[[], Any]:
        wanted = (leaf, *parameters.parameters())
        return lambda: torch.autograd.grad(forward(leaf), wanted, grad)

    def eager(normalize: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            with torch.autocast(device.type, dtype, enabled=device.type == "cuda"):
                return nn.functional.relu(normalize(x)).to(dtype)

        return forward

    def ours(x: Tensor) -> Tensor:
        return norm.group_norm_relu(x, module.weight, module.bias, groups, module.eps)

    found = {OURS: step(ours, module), PEER: step(eager(module), module)}
    if compiled:
        torch.compiler.reset()
        found[COMPILED] = step(torch.compile(eager(module), dynamic=False), module)
    if (apex := _apex(groups, channels, device)) is not None:
        found[APEX] = step(eager(apex), apex)
    return found | {COPY: lambda: target.copy_(x)}


def _apex(groups: int, channels: int, device: torch.device) -> nn.Module | None:
    """NVIDIA apex's group norm for channels-last activations, which knows no ReLU."""
    if device.type != "cuda":
        return None
    try:
        from apex.contrib.group_norm import GroupNorm
    except ImportError:
        return None
    return GroupNorm(groups, channels).to(device)


def run(
    model: str,
    repeats: int,
    device: torch.device,
    *,
    size: int = 224,
    batch: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    compiled: bool = False,
) -> dict:
    """The measurement as a record for JSON; `batch`: 8 on the CPU and 128 on a GPU.

    UserError where the operator is not built for the device, or there is none.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible to this process; run it on a GPU node, or with --device cpu")
    if not norm.fits(torch.empty(0, dtype=dtype, device=device), *(torch.empty(0, device=device) for _ in range(2))):
        raise UserError(
            f"the operator is not built for {device.type}; build it with python setup.py build_ext --inplace"
        )
    Precision("fp32", device).prepare()  # memory as in training, for all of them
    batch = batch or (128 if device.type == "cuda" else 8)
    hardware = timing.hardware(device)  # before this run is itself the load
    groups = family.member(model).groups
    times: dict[str, timing.Times] = {}
    facts: list[dict[str, Any]] = []
    for (channels, side), count in sorted(shapes(model, size).items(), key=lambda item: (-item[0][1], item[0][0])):
        steps = variants(channels, side, groups, batch, dtype, device, compiled)
        of_shape = timing.measure(steps, repeats=repeats, device=device, queued=True)
        shape = f"{channels}x{side}x{side}"
        times |= {f"{shape} {name}": t for name, t in of_shape.items()}
        ours, copy = of_shape[OURS].median, of_shape[COPY].median
        facts.append(
            {
                "shape": shape,
                "norms": count,
                "speedup": of_shape[PEER].median / ours,
                "speedups": {name: t.median / ours for name, t in of_shape.items() if name not in (OURS, COPY)},
                "of_bound": MOVED * copy / ours,
                "gb_per_s": 5 * batch * channels * side**2 * dtype.itemsize / ours / 1e6,
            }
        )
    command = f"python -m bench.kernel --op group_norm_relu --model {model} --device {device.type} --repeats {repeats}"
    record = timing.record(
        command + (" --compiled" if compiled else "") + " --json",
        times,
        supports="normalization",
        device=device,
        model=model,
        batch=batch,
        size=size,
        dtype=str(dtype).removeprefix("torch."),
        shapes=facts,
        geometric_mean_speedup=_geometric_mean([fact["speedup"] for fact in facts]),
        geometric_mean_speedups={
            name: _geometric_mean([fact["speedups"][name] for fact in facts]) for name in facts[0]["speedups"]
        },
    )
    return record | {"hardware": hardware}


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def show(report: dict[str, Any]) -> str:
    """The record for people."""
    hardware = report["hardware"]
    where = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} threads"
    peers = list(report["geometric_mean_speedups"])
    lines = [
        f"{report['model']} at {report['size']} px, batch {report['batch']}, {report['dtype']}, forward and backward; "
        f"{where}; times as long as the {OURS}",
        f"{'shape':>14} {'norms':>6} {OURS:>12} {'GB/s':>7} {'of bound':>9}" + "".join(f"{p:>25}" for p in peers),
    ]
    for fact in report["shapes"]:
        ours = report["milliseconds"][f"{fact['shape']} {OURS}"]["median"]
        lines.append(
            f"{fact['shape']:>14} {fact['norms']:6d} {ours:9.3f} ms {fact['gb_per_s']:7.0f} {fact['of_bound']:8.0%} "
            + "".join(f"{fact['speedups'][peer]:24.2f}x" for peer in peers)
        )
    means = "".join(f"{mean:24.2f}x" for mean in report["geometric_mean_speedups"].values())
    return "\n".join([*lines, f"{'geometric mean':<53}{means}"])
