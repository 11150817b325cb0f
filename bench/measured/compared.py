"""What `bench/train_step.py --peers` and `--ablate` measure: whole steps on one batch, in turns in one process."""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from bench.measured import timing
from bench.measured.training import Setup, TimedTrainer, build, synthetic
from bench.peers import steps
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.network import norm, products
from loaders.errors import UserError

OURS = "ours"
ABLATIONS: dict[str, dict[str, Any]] = {
    "norm by torch": {"by_torch": "norm"},
    "convolutions by torch": {"by_torch": "convolutions"},
    "standardizing in the network": {"standardize": "network"},
    "foreach optimizer": {"implementation": "foreach", "standardize": "network"},
    "contiguous": {"channels_last": False},
    "recompute norm": {"recompute": "norm"},
    "recompute unit": {"recompute": "unit"},
    "four micro-batches": {"micro_batches": 4},
    "four, reproducible": {"micro_batches": 4, "reproducible": True},
}
"""Each of our step's switches the other way; and what reproducible steps cost, beside as many micro-batches."""
PARTS = {
    "convolution": ("conv", "mkldnn", "onednn", "cudnn", "gemm", "addmm", "::mm"),
    "norm": ("group_norm", "batch_norm", "layer_norm", "native_norm"),
    "optimizer": ("agc_sgd", "_fused_sgd", "write_copy", "linalg_vector_norm", "_foreach_norm"),
    "pooling": ("pool", "constant_pad"),
}
"""Part of a step: what the names of its operations hold; the rest is elementwise and copies."""


def run(setup: Setup, what: str, repeats: int, warmup: int, trace: str | None = None) -> dict[str, Any]:
    """Times of our step and of the peers' ("peers"), or of it with each switch turned ("ablate"), as a record.

    `trace`: a file for the time line of one step of ours, which Perfetto and chrome://tracing show.

    UserError where nothing is there to compare with.
    """
    comm = Communicator(Launch("alone"))
    gpu = torch.cuda.is_available() and setup.device != "cpu"
    hardware = timing.hardware("cuda" if gpu else "cpu")
    ours, trainer, batch = _ours(setup, comm)
    device = trainer.flat.values.device
    variants: dict[str, Callable[[], Any]] = {OURS: ours}
    if what == "peers":
        variants |= steps.steps(
            setup.network,
            setup.num_classes,
            setup.precision,
            torch.channels_last if setup.channels_last else torch.contiguous_format,
            batch.images,
            batch.labels,
        )
    else:
        for name, change in ABLATIONS.items():
            changed = replace(setup, **{key: value for key, value in change.items() if key != "by_torch"})
            if setup.batch % changed.micro_batches == 0:
                variants[name], *_ = _ours(changed, comm, by_torch=change.get("by_torch"))
    if len(variants) == 1:
        raise UserError(
            f"--peers: neither timm nor torchvision is installed, or none has a counterpart of {setup.network}"
        )
    times, ratios = _turns(variants, repeats, warmup, device)
    return timing.record(
        shlex.join(["python", "bench/train_step.py", *sys.argv[1:]]),
        times,
        supports="training",
        spread="10th and 90th percentile; of ratios: lowest and highest turn",
        device=device,
        network=setup.network,
        batch=setup.batch,
        size=setup.size,
        precision=setup.precision,
        images_per_second={name: 1e3 * setup.batch / t.median for name, t in times.items()},
        ours_over=ratios,
        breakdown_percent={name: breakdown(step, trace if name == OURS else None) for name, step in variants.items()},
        hardware=hardware,
    )


def _turns(
    variants: dict[str, Callable[[], Any]], repeats: int, warmup: int, device: torch.device
) -> tuple[dict[str, timing.Times], dict[str, dict[str, float]]]:
    """Times, and how many times as fast as each other ours was, by turns: a machine's clock drifts between them."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + repeats):
        of_turn = timing.measure(variants, repeats=1, device=device, warmup=0)
        if turn >= warmup:
            for name, t in of_turn.items():
                taken[name].append(t.median)
        end = "\r" if turn + 1 < warmup + repeats else "\n"
        print(f"turn {turn + 1} of {warmup + repeats}", end=end, file=sys.stderr, flush=True)
    ratios = {}
    for name, theirs in taken.items():
        if name != OURS:
            each = [b / a for a, b in zip(taken[OURS], theirs, strict=True)]
            ratios[name] = {"median": statistics.median(each), "low": min(each), "high": max(each), "n": len(each)}
    return {name: timing.summarize(values) for name, values in taken.items()}, ratios


def _ours(
    setup: Setup, comm: Communicator, *, by_torch: str | None = None
) -> tuple[Callable[[], Any], TimedTrainer, Any]:
    with _switches_as_before():
        trainer = build(setup, comm)
    trainer.model.train()
    batch = next(synthetic(setup, comm, trainer.flat.values.device))

    def step() -> None:
        with _by_torch(by_torch) if by_torch else nullcontext(), _switches_as_before():
            trainer.precision.prepare()
            trainer.train_step(batch)
        trainer.watch.restart()
        trainer.losses.clear()

    return step, trainer, batch[0]


@contextmanager
def _switches_as_before() -> Iterator[None]:
    """What one step sets for the whole process is not so for another's."""
    mode, benchmark = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def _by_torch(what: str) -> Iterator[None]:
    module, chooses = _CHOOSES[what]
    chosen = getattr(module, chooses)
    setattr(module, chooses, lambda *_: False)
    try:
        yield
    finally:
        setattr(module, chooses, chosen)


_CHOOSES = {"norm": (norm, "fits"), "convolutions": (products, "taken")}
"""The function that says whether ours is taken."""


def breakdown(step: Callable[[], Any], trace: str | None = None) -> dict[str, float]:
    """Percent of a step's time in each of `PARTS` and elsewhere, by a profile of one step; `trace`: a file for it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    gpu = torch.cuda.is_available()
    if gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if gpu:
            torch.cuda.synchronize()
    if trace:
        profile.export_chrome_trace(trace)
    sums = dict.fromkeys([*PARTS, "elementwise and copies"], 0.0)
    for event in profile.key_averages():
        time = event.self_device_time_total if gpu else event.self_cpu_time_total
        part = next((part for part, words in PARTS.items() if any(word in event.key.lower() for word in words)), None)
        sums[part or "elementwise and copies"] += time
    total = sum(sums.values()) or 1.0
    return {part: 100 * value / total for part, value in sums.items()}


def describe(result: dict[str, Any]) -> str:
    """The record for people."""
    hardware = result["hardware"]
    lines = [
        f"{result['network']}, {result['batch']} images of {result['size']} px, {result['precision']}; "
        f"{hardware.get('gpu', hardware['cpu'])}, {hardware['threads']} threads, n = {result['n']}",
        f"{'':30} {'images/s':>9} {'ours is':>9}   " + ", ".join([*PARTS, "rest"]),
    ]
    for name, rate in result["images_per_second"].items():
        over = result["ours_over"].get(name)
        said = "" if over is None else f"{over['median']:.2f}x"
        shares = " ".join(f"{share:4.0f}%" for share in result["breakdown_percent"][name].values())
        lines.append(f"{name:30} {rate:9.2f} {said:>9}   {shares}")
    return "\n".join(lines)
