"""What `bench/kernel.py --op group_norm_relu` measures: group norm and ReLU at each shape of a network, in turns.

Forward and backward at once, channels-last, by the operator and by torch's GroupNorm and ReLU. The bound is the time in
which a copy, measured in the same run, moves the 5 activations that must move: forward reads one and writes one,
backward reads two and writes one.
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
from loaders.errors import UserError

OURS, PEER, COPY = "operator", "torch GroupNorm + ReLU", "copy"
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


def variants(channels: int, side: int, groups: int, batch: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """A forward and backward pass of each, and the copy, on one input and one gradient."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(batch, channels, side, side, generator=generator).to(dtype).to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    module = nn.GroupNorm(groups, channels)
    parameters = (module.weight, module.bias)
    leaf, target = x.clone().requires_grad_(), torch.empty_like(x)

    def ours() -> None:
        out = norm.group_norm_relu(leaf, module.weight, module.bias, groups, module.eps)
        torch.autograd.grad(out, (leaf, *parameters), grad)

    def theirs() -> None:
        torch.autograd.grad(nn.functional.relu(module(leaf)), (leaf, *parameters), grad)

    return {OURS: ours, PEER: theirs, COPY: lambda: target.copy_(x)}


def run(model: str, repeats: int, *, size: int = 224, batch: int = 8, dtype: torch.dtype = torch.bfloat16) -> dict:
    """The measurement as a record for JSON. UserError where the operator is not built."""
    if not norm.fits(torch.empty(0, dtype=dtype), torch.empty(0), torch.empty(0)):
        raise UserError("the operator is not built; build it with python setup.py build_ext --inplace")
    hardware = timing.hardware()  # before this run is itself the load
    groups = family.member(model).groups
    times: dict[str, timing.Times] = {}
    facts: list[dict[str, Any]] = []
    for (channels, side), count in sorted(shapes(model, size).items(), key=lambda item: (-item[0][1], item[0][0])):
        of_shape = timing.measure(variants(channels, side, groups, batch, dtype), repeats=repeats)
        ours, theirs, copy = (of_shape[name].median for name in (OURS, PEER, COPY))
        shape = f"{channels}x{side}x{side}"
        times |= {f"{shape} {name}": t for name, t in of_shape.items()}
        facts.append({"shape": shape, "norms": count, "speedup": theirs / ours, "of_bound": MOVED * copy / ours})
    command = f"python -m bench.kernel --op group_norm_relu --model {model} --device cpu --repeats {repeats} --json"
    mean = math.exp(sum(math.log(fact["speedup"]) for fact in facts) / len(facts))
    record = timing.record(
        command,
        times,
        supports="normalization",
        model=model,
        batch=batch,
        size=size,
        dtype=str(dtype).removeprefix("torch."),
        shapes=facts,
        geometric_mean_speedup=mean,
    )
    return record | {"hardware": hardware}


def show(report: dict[str, Any]) -> str:
    """The record for people."""
    lines = [
        f"{report['model']} at {report['size']} px, batch {report['batch']}, {report['dtype']}, forward and backward; "
        f"{report['hardware']['cpu']}, {report['hardware']['threads']} threads",
        f"{'shape':>14} {'norms':>6} {OURS:>10} {PEER:>24} {'ratio':>7} {'of bound':>9}",
    ]
    for fact in report["shapes"]:
        ours, theirs = (report["milliseconds"][f"{fact['shape']} {name}"]["median"] for name in (OURS, PEER))
        lines.append(
            f"{fact['shape']:>14} {fact['norms']:6d} {ours:7.2f} ms {theirs:21.2f} ms {fact['speedup']:6.2f}x "
            f"{fact['of_bound']:8.0%}"
        )
    return "\n".join([*lines, f"geometric mean of the ratios {report['geometric_mean_speedup']:.2f}"])
