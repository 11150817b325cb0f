"""Timing that can be compared: variants interleaved in one run, median and spread, and a record of what ran where.

    variants = {"ours": ours, "theirs": theirs}          # each a call without arguments
    times = measure(variants, repeats=30, device=torch.device("cpu"))
    print(table(times, relative_to="theirs"))
    report = record("python -m bench.kernel", times, supports="optimizer", device=..., model="R50x1")
    Path("kernel.json").write_text(json.dumps(report, indent=1))

Only ratios of variants of one run mean something: the machine is shared, and its clock is not fixed.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from engine.monitoring.metrics import processor


@dataclass(frozen=True)
class Times:
    """How long one variant took, milliseconds."""

    median: float
    low: float
    """10th percentile."""
    high: float
    """90th percentile."""
    best: float
    n: int
    """Repeats that were timed."""


def measure(
    variants: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    device: torch.device | str = "cpu",
    warmup: int = 3,
    between: Callable[[], Any] | None = None,
    queued: bool = False,
) -> dict[str, Times]:
    """Times each variant `repeats` times, in turns, after `warmup` turns that do not count.

    The order within a turn rotates, so that none always follows the same other. `between` runs, untimed, before each
    call: to restore inputs, or to flush a cache. On a GPU each call is enclosed by two events, and the device is
    idle when it starts, so launch costs count where the device waits for them; unless `queued`: then the device is
    kept busy for 13 to 18 ms first, so that the host is ahead of it, as it is in the middle of training.
    """
    if not variants or repeats < 1:
        raise ValueError(f"{len(variants)} variants, {repeats} repeats; at least 1 of each expected")
    device = torch.device(device)
    clock = _cpu_milliseconds
    if device.type == "cuda":
        clock = _queued_milliseconds if queued else _gpu_milliseconds
    names = list(variants)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            if between is not None:
                between()
            milliseconds = clock(variants[name])
            if turn >= warmup:
                taken[name].append(milliseconds)
    return {name: summarize(values) for name, values in taken.items()}


def summarize(values: list[float]) -> Times:
    """Median and spread of single times in milliseconds."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return Times(
        median=statistics.median(ordered),
        low=ordered[round(0.1 * last)],
        high=ordered[round(0.9 * last)],
        best=ordered[0],
        n=len(ordered),
    )


def record(
    command: str,
    times: Mapping[str, Times],
    *,
    supports: str,
    spread: str = "10th and 90th percentile",
    device: torch.device | str = "cpu",
    **facts: Any,
) -> dict:
    """What a result must carry, ready for JSON: `command` that repeats it, times, hardware, versions, commit, n.

    `supports`: what it may be quoted for (docs/contributing.md); `spread`: what its lows and highs are; `facts`:
    whatever else belongs to it, such as the model or derived figures; among them `n` where times have several.
    """
    return {
        "command": command,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(device),
        "versions": versions(),
        "supports": [supports],
        "spread": spread,
        "n": max(value.n for value in times.values()),
        **facts,
        "milliseconds": {name: asdict(value) for name, value in times.items()},
    }


def hardware(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Processor, the vectors torch takes, cores, threads and load; for a GPU its name, memory and number too."""
    device = torch.device(device)
    found: dict[str, Any] = {
        "cpu": processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "load_before": _load(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["gpus_visible"] = torch.cuda.device_count()
    return found


def versions() -> dict[str, str]:
    """Of Python and of the libraries that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    for name in ("timm", "horovod", "h5py", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "ffcv"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of this checkout, with `+changes` where files differ from it; `unknown` outside git.

    A job that copied the tree to its nodes says it in BOOSTERBIT_COMMIT.
    """
    if told := os.environ.get("BOOSTERBIT_COMMIT"):
        return told
    root = Path(__file__).parent
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, encoding="utf-8", errors="replace"
    )
    if head.returncode:
        return "unknown"
    status = ["git", "status", "--porcelain", "--untracked-files=no"]
    changed = subprocess.run(status, cwd=root, capture_output=True, encoding="utf-8", errors="replace").stdout.strip()
    return head.stdout.strip() + ("+changes" if changed else "")


def table(times: Mapping[str, Times], relative_to: str | None = None) -> str:
    """The times for people: a line each, and how many times as long as `relative_to` it took."""
    width = max(map(len, times))
    lines = [f"{'':{width}}  {'median':>9} {'10%':>9} {'90%':>9}   ms, n = {next(iter(times.values())).n}"]
    for name, t in times.items():
        ratio = "" if relative_to is None else f"   {t.median / times[relative_to].median:6.2f}x"
        lines.append(f"{name:{width}}  {t.median:9.3f} {t.low:9.3f} {t.high:9.3f}{ratio}")
    return "\n".join(lines)


def _cpu_milliseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _queued_milliseconds(call: Callable[[], Any]) -> float:
    return _gpu_milliseconds(call, busy_cycles=25_000_000)


def _gpu_milliseconds(call: Callable[[], Any], busy_cycles: int = 0) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if busy_cycles:
        torch.cuda._sleep(busy_cycles)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None
