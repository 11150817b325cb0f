"""Loaders timed in turns: what `bench/loader.py` measures, and how it is shown."""

import contextlib
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from bench.peers.loaders import Material
from engine.whole import picture
from loaders.packs.shard import Pack
from loaders.pipelines.upload import to_device

OURS, CEILING, COLD = "pack, DALI", "DALI graph fed from memory", "pack, DALI, cold cache"
HOST = "pack, host pipeline"


@dataclass(frozen=True)
class Turns:
    """What one loader did."""

    rates: list[float]
    """Images per second of each turn."""
    latencies: list[float]
    """Milliseconds of every timed batch."""
    disk: list[float]
    """Megabytes that this process read from disks during each turn (not what its worker processes read)."""
    cpu: list[float]
    """Milliseconds of processor time per image of this process in each turn (not of its worker processes)."""


def measure(
    material: Material, loaders: dict[str, Callable], turns: int, batches: int, warm: int, cold: bool
) -> dict[str, Turns]:
    """Time `batches` batches of each loader, `turns` times, in an order that rotates."""
    done = {name: Turns([], [], [], []) for name in loaders} | ({COLD: Turns([], [], [], [])} if cold else {})
    names, once = list(done), len(Pack.open(material.pack)) // material.batch
    for turn in range(turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name == COLD:
                drop_cache(material.pack)
            read = bytes_from_disk()
            stream = _delivered(loaders[OURS if name == COLD else name](material), torch.device(material.device))
            try:
                # Cold is the first pass only: after it the page cache holds the file.
                took, worked = _time(stream, once if name == COLD else batches, 0 if name == COLD else warm)
            finally:
                stream.close()
            done[name].rates.append(material.batch * len(took) / sum(took))
            done[name].disk.append((bytes_from_disk() - read) / 1e6)
            done[name].cpu.append(1e3 * worked / (material.batch * len(took)))
            done[name].latencies.extend(1e3 * t for t in took)
            print(f"turn {turn + 1}: {name:28} {done[name].rates[-1]:8.1f} images/s", file=sys.stderr, flush=True)
    return done


def _delivered(stream: Iterator, device: torch.device) -> Generator:
    """Batches on the device, there in full: what a loader began and left to the device counts."""
    with contextlib.closing(cast(Generator, stream)):
        for images in stream:
            there = to_device(images, device)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            yield there


def _time(stream: Iterator, batches: int, warm: int) -> tuple[list[float], float]:
    """Seconds of each batch, and this process's processor time for all."""
    for _ in range(warm):
        next(stream)
    took, worked = [], time.process_time()
    for _ in range(batches):
        start = time.perf_counter()
        next(stream)
        took.append(time.perf_counter() - start)
    return took, time.process_time() - worked


def ratios(done: dict[str, Turns], over: str) -> dict[str, dict[str, float]]:
    """Rate of `over` divided by each other loader's, turn by turn: median, least and greatest."""
    found = {}
    for name, turns in done.items():
        if name != over:
            each = [a / b for a, b in zip(done[over].rates, turns.rates, strict=True)]
            found[name] = {"median": statistics.median(each), "low": min(each), "high": max(each), "n": len(each)}
    return found


def report(done: dict[str, Turns], threads: int) -> dict[str, Any]:
    """Rates, rates per core, latency percentiles."""
    return {
        name: {
            "images_per_second": statistics.median(turns.rates),
            "low": min(turns.rates),
            "high": max(turns.rates),
            "per_core": statistics.median(turns.rates) / threads,
            "own_cpu_ms_per_image": statistics.median(turns.cpu),
            "disk_mb_per_turn": statistics.median(turns.disk),
            "latency_ms": {f"p{q}": float(np.percentile(turns.latencies, q)) for q in (50, 90, 99)},
        }
        for name, turns in done.items()
    }


def table(rates: dict[str, Any], compared: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{'':28} {'images/s':>9} {'low':>7} {'high':>7} {'per core':>9} {'p50 ms':>8} {'p99 ms':>8}"
        f" {'own CPU':>8}  pack is"
    ]
    for name, r in rates.items():
        times = f"{compared[name]['median']:.2f}x" if name in compared else ""
        lines.append(
            f"{name:28} {r['images_per_second']:9.0f} {r['low']:7.0f} {r['high']:7.0f} {r['per_core']:9.0f}"
            f" {r['latency_ms']['p50']:8.1f} {r['latency_ms']['p99']:8.1f} {r['own_cpu_ms_per_image']:8.3f}  {times}"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of images per second with their range."""
    from matplotlib.figure import Figure

    rates = dict(sorted(result["loaders"].items(), key=lambda each: each[1]["images_per_second"]))
    middle = [r["images_per_second"] for r in rates.values()]
    spread = [[r["images_per_second"] - r["low"] for r in rates.values()],
              [r["high"] - r["images_per_second"] for r in rates.values()]]  # fmt: skip
    figure = Figure(figsize=(7, 0.45 * len(rates) + 1.4), layout="constrained")
    axes = figure.subplots()
    colours = ["tab:blue" if name.startswith("pack") else "tab:gray" for name in rates]
    bars = axes.barh(list(rates), middle, xerr=spread, color=colours, capsize=3)
    axes.bar_label(bars, [f"{m:.0f}" for m in middle], padding=4)
    axes.set_xlabel("images per second (median of turns; line: lowest to highest)")
    axes.set_title(
        f"{result['what']}\n{result['threads']} threads, {result['hardware']['cpu']}", loc="left", fontsize="medium"
    )
    axes.margins(x=0.12)
    picture(figure, path, dpi=120)


def drop_cache(path: Path) -> None:
    """Ask the kernel to forget a file's pages, so that the next read is from the disk; pages still mapped stay."""
    gc.collect()  # a pack that nobody uses any more may still be mapped
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_from_disk() -> int:
    """What this process has had read from disks so far."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
