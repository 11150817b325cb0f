"""What bounds a run: from a table of figures, a row for each rank, to one finding, with what it rests on and the
setting to change. Pure: no clock, no device, no file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

EXPLAINS = 0.8
"""Share of the lost time that a cause must explain to be named."""
HEALTHY = 0.15
"""Share of a step that may be lost."""
AHEAD = 0.2
"""Share of steps that the host issues in time, below which a GPU waits for it."""
BUSY = 0.3
"""Share of the decoding threads that compute while the step waits, below which they wait for something themselves; of
threads that share their cores with others it is less than 1, too."""
COLUMNS = ("input", "compute", "wait", "optimizer", "other", "decoding", "launching", "ahead",
           "clock", "most_clock", "power", "temperature", "throttled")  # fmt: skip
"""Seconds a step, each rank's mean: waiting for its batch, forward and backward, waiting for the others, optimizer, and
what is between steps; in `input` the threads' seconds of CPU; starting operations (of a CPU). Shares, MHz, W, °C, a
share. NaN is unknown."""

_WHERE = {"late": "waiting for a rank that is late", "communication": "communication", "input": "waiting for input",
          "launching": "starting operations", "unexplained": "what is between the parts of a step",
          "memory": "waiting for memory", "throttled": "a lower clock"}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What else is known of a run."""

    hosts: Sequence[str]  # of each rank
    device: str = "cpu"
    threads: int = 1  # decoding, of each rank
    cores: float = 1.0  # of each rank
    keys: str = "train."  # before the names of settings: pre-training has sections
    moving: float = math.nan  # seconds a step that the memory takes for what the passes read and write
    link: int | None = None  # the rank whose link was found to be slow


@dataclass(frozen=True)
class Finding:
    """What bounds a run."""

    kind: str
    because: str  # the figures it rests on
    change: str  # what to change; empty where nothing is to


def diagnose(table: Mapping[str, np.ndarray], facts: Facts) -> Finding | None:
    """The one cause that explains what is lost, or that little is; None where no single one does.

    table: each of `COLUMNS`, (ranks,).
    """
    own = table["input"] + table["compute"] + table["optimizer"]
    usual = int(np.argsort(own, kind="stable")[(len(own) - 1) // 2])  # a rank that is as fast as most
    step = float(own[usual] + table["wait"][usual] + table["other"][usual])
    if not step > 0:
        return None
    lost = _lost(table, facts, own, usual)
    total = sum(lost.values())
    if total < HEALTHY * step:
        largest = max(lost, key=lambda name: lost[name])
        most = f", most of it in {_WHERE[largest]}" if lost[largest] > total / 2 else ""
        said = f"of a step of {_ms(step)} {total / step:.0%} is lost{most}"
        return Finding("healthy", said, "")
    cause = max(lost, key=lambda name: lost[name])
    if lost[cause] < EXPLAINS * total or cause == "unexplained":
        return None
    rests = f"{_ms(lost[cause])} of a step of {_ms(step)}, {lost[cause] / total:.0%} of what is lost"
    if cause == "late":
        return _slow(table, facts, own, rests)
    if cause == "input":
        return _input(table, facts, usual, step, rests)
    if cause == "communication" and facts.link is not None:
        where = f"rank {facts.link} on {facts.hosts[facts.link]}"
        return Finding("slow rank", f"all wait for the link of {where}: {rests}", _leave_out(facts, facts.link))
    return _FINDINGS[cause](table, facts, rests)


def _lost(table: Mapping[str, np.ndarray], facts: Facts, own: np.ndarray, usual: int) -> dict[str, float]:
    """Seconds of a step of the usual rank, by cause."""
    compute, waited = float(table["compute"][usual]), float(table["wait"][usual])
    late = min(waited, float(own.max() - own[usual]))
    communication = min(waited - late, float(table["wait"].min()))
    lost = {
        "late": late,
        "communication": communication,
        "input": float(table["input"][usual]),
        "launching": _launching(table, facts, compute),
        "unexplained": float(table["other"][usual]) + waited - late - communication,
    }
    rest = compute - lost["launching"]
    lost["memory"] = min(rest, facts.moving) if facts.moving >= EXPLAINS * rest else 0.0
    slowed = np.nanmedian(table["clock"] / table["most_clock"]) if np.isfinite(table["clock"]).any() else 1.0
    if np.median(np.nan_to_num(table["throttled"])) > 0.5:
        lost["throttled"] = (compute - lost["launching"]) * float(1 - slowed)
        lost["memory"] = 0.0
    return lost


def _launching(table: Mapping[str, np.ndarray], facts: Facts, compute: float) -> float:
    if facts.device == "cuda":
        return compute if float(np.median(table["ahead"])) < AHEAD else 0.0
    return min(compute, float(np.nan_to_num(np.median(table["launching"]))))


def _slow(table: Mapping[str, np.ndarray], facts: Facts, own: np.ndarray, rests: str) -> Finding:
    rank, hosts = int(own.argmax()), np.array(facts.hosts)
    here, others = hosts == hosts[rank], np.delete(np.arange(len(own)), rank)
    excess = {name: table[name][rank] - np.median(table[name][others]) for name in ("input", "compute")}
    reason = max(excess, key=lambda name: excess[name])
    said = {"input": "input", "compute": "forward and backward"}[reason]
    beside = f"its {said} take {_ms(table[reason][rank])}, the others' {_ms(float(np.median(table[reason][others])))}"
    clocks = table["clock"]
    usual_clock = float(np.median(clocks[others]))
    if reason == "compute" and (table["throttled"][rank] > 0.5 or clocks[rank] < 0.9 * usual_clock):
        facts_said = f"{clocks[rank]:.0f} MHz, the others {usual_clock:.0f}, at {table['temperature'][rank]:.0f} °C"
        why = f"all wait for the GPU of rank {rank} on {hosts[rank]} ({facts_said}): {rests}; {beside}"
        return Finding("throttled GPU", why, f"its cooling and power; {_leave_out(facts, rank)}")
    elsewhere = own[~here]
    if here.sum() > 1 and len(elsewhere) and own[here].min() > (own[rank] + np.median(elsewhere)) / 2:
        return Finding("slow node", f"all wait for the {here.sum()} ranks on {hosts[rank]}: {rests}; {beside}",
                       _leave_out(facts, rank))  # fmt: skip
    look = {"input": "the storage of", "compute": "what else runs on"}[reason]
    change = f"{look} {hosts[rank]}; {_leave_out(facts, rank)}"
    return Finding("slow rank", f"all wait for rank {rank} on {hosts[rank]}: {rests}; {beside}", change)


def _leave_out(facts: Facts, rank: int) -> str:
    several = len(set(facts.hosts)) > 1
    return f"or leave the node out (sbatch --exclude={facts.hosts[rank]})" if several else "or take fewer ranks here"


def _input(table: Mapping[str, np.ndarray], facts: Facts, usual: int, step: float, rests: str) -> Finding:
    waited = float(table["input"][usual])
    at_once = float(table["decoding"][usual]) / waited
    said = f"the step waits for its batch: {rests}; {at_once:.1f} of {facts.threads} decoding threads compute meanwhile"
    if at_once < BUSY * min(facts.threads, facts.cores):
        change = "the storage: stage the pack on the node (jobs/submit.py --stage), or data.shuffle=blocks"
        return Finding("input-bound", f"{said}: they wait for bytes", change)
    needed = math.ceil(facts.threads * step / (step - waited)) if waited < step else facts.threads + 1
    if needed <= facts.cores:
        return Finding("input-bound", said, f"data.threads={needed}")
    change = f"{needed} threads were needed, and there are {facts.cores:g} cores a rank: pack smaller images "
    return Finding("input-bound", said, change + "(loaders.pack --resize), or decode on the GPU (data.decode=gpu)")


def _launch_bound(table: Mapping[str, np.ndarray], facts: Facts, rests: str) -> Finding:
    larger = f"larger micro-batches ({facts.keys}micro_batch=auto)"
    if facts.device == "cuda":
        said = f"in only {float(np.median(table['ahead'])):.0%} of the steps the host was ahead of the GPU: {rests}"
        return Finding("launch-bound", said, f"{facts.keys}graph=on, or {larger}")
    said = f"starting operations takes longer than doing them: {rests}"
    return Finding("launch-bound", said, f"{larger}, or a larger batch")


def _memory_bound(table: Mapping[str, np.ndarray], facts: Facts, rests: str) -> Finding:
    said = f"reading and writing memory takes as long as the passes: {rests}"
    return Finding("memory-bound", said, f"{facts.keys}precision=bf16, which halves it from fp32 or tf32")


def _communication_bound(table: Mapping[str, np.ndarray], facts: Facts, rests: str) -> Finding:
    said = f"all ranks wait for each other's gradients, none is late: {rests}"
    change = "comm.gradients=bf16 (comm.backend=torch), more images a rank and step, or fewer ranks"
    return Finding("communication-bound", said, change)


def _throttled(table: Mapping[str, np.ndarray], facts: Facts, rests: str) -> Finding:
    clock, most = float(np.nanmedian(table["clock"])), float(np.nanmedian(table["most_clock"]))
    said = f"heat or power supply slow the GPUs down, {clock:.0f} of {most:.0f} MHz: {rests}"
    return Finding("throttled GPU", said, "their cooling and power supply")


_FINDINGS = {
    "launching": _launch_bound,
    "memory": _memory_bound,
    "communication": _communication_bound,
    "throttled": _throttled,
}


def text(table: Mapping[str, np.ndarray], facts: Facts) -> str:
    """The table for people: milliseconds a step, a line for each rank; of many the first, the slowest and the last."""
    shown = [name for name in COLUMNS if np.isfinite(table[name]).any() and name != "most_clock"]
    names = {"clock": "MHz", "power": "W", "temperature": "°C"}
    times = COLUMNS[: COLUMNS.index("ahead")]
    own = table["input"] + table["compute"] + table["optimizer"]
    ranks = list(range(len(own)))
    if len(own) > 16:
        ranks = sorted({*range(6), *np.argsort(own)[-6:].tolist(), *range(len(own) - 4, len(own))})
    wide = max(len("host"), *(len(facts.hosts[rank]) for rank in ranks))
    head = "".join(f"{names.get(name, name):>12}" for name in shown)
    lines = [f"{'rank':>5} {'host':<{wide}}{head}   ms a step"]
    for rank in ranks:
        cells = [_cell(name, float(table[name][rank]), name in times) for name in shown]
        lines.append(f"{rank:>5} {facts.hosts[rank]:<{wide}}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def _cell(name: str, value: float, is_time: bool) -> str:
    if math.isnan(value):
        return "–"
    if is_time:
        return f"{1e3 * value:.2f}"
    return f"{value:.0%}" if name in ("ahead", "throttled") else f"{value:.0f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def said(finding: Finding) -> str:
    """A finding for people."""
    return f"{finding.kind}: {finding.because}" + (f"; change {finding.change}" if finding.change else "")


def report(table: Mapping[str, np.ndarray], facts: Facts) -> str:
    """The finding for people, or, where there is none, the table alone."""
    finding = diagnose(table, facts)
    return said(finding) if finding else f"where the time goes; no one cause explains it:\n{text(table, facts)}"
