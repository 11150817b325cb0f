"""Rows of a scaling table, modelled or measured: for people, for JSON, and as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.model.facts import Cluster, Profile
from bench.model.scaling import Step
from engine.network import family
from engine.whole import picture

OURS, THEIRS, IDEAL = "tab:blue", "tab:orange", "0.6"
CAUSES = {
    "contention": "all-reduce moving bytes through GPU memory while the network computes",
    "exposed": "gradients still under way when the backward pass has ended",
    "stragglers": "waiting for the slowest rank",
    "input": "waiting for images",
}


@dataclass(frozen=True)
class Row:
    """One size."""

    gpus: int
    images_per_second: float
    speedup: float
    efficiency: float  # percent: 100 T(N) / (N T(1))
    source: str  # "measured" or "modelled"
    more: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        shown = {name: getattr(self, name) for name in ("gpus", "images_per_second", "speedup", "efficiency", "source")}
        return shown | self.more


def modelled(steps: Sequence[Step]) -> list[Row]:
    """Rows of a sweep of the model that begins at one GPU."""
    one = steps[0].images_per_second
    return [
        Row(
            step.gpus,
            step.images_per_second,
            step.images_per_second / one,
            step.efficiency,
            "modelled",
            {"step_seconds": step.seconds, "lost_percent": step.lost()},
        )
        for step in steps
    ]


def table(rows: Sequence[Row], reference: Mapping[int, float] | None = None, label: str = "paper") -> str:
    """The rows, beside the images/s of a `reference` (GPUs → images/s, with one GPU) where sizes agree."""
    head = f"{'GPUs':>6} {'images/s':>12} {'speedup':>9} {'E(N) %':>7}  {'':9}"
    if reference:
        head += f" | {f'{label}: images/s':>20} {'speedup':>8} {'E(N) %':>7} {'difference':>10}"
    lines = [head.rstrip()]
    for row in rows:
        line = f"{row.gpus:6,} {row.images_per_second:12,.2f} {row.speedup:9.2f} {row.efficiency:7.2f}  {row.source:9}"
        if reference and row.gpus in reference:
            rate, one = reference[row.gpus], reference[1]
            difference = 100 * (row.images_per_second / rate - 1)
            line += f" | {rate:20,.2f} {rate / one:8.2f} {100 * rate / one / row.gpus:7.2f} {difference:+9.2f}%"
        elif reference:
            line += f" | {'-':>20} {'-':>8} {'-':>7} {'-':>10}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def explain(rows: Sequence[Row]) -> str:
    """Where the lost percent go at each size, with what each cause means."""
    lines = [f"{'GPUs':>6} {'E(N) %':>7} " + " ".join(f"{name:>11}" for name in CAUSES) + "   percent of E(N) lost to"]
    for row in rows:
        lost = row.more["lost_percent"]
        lines.append(f"{row.gpus:6,} {row.efficiency:7.2f} " + " ".join(f"{lost[name]:11.2f}" for name in CAUSES))
    return "\n".join(lines + [f"  {name}: {text}" for name, text in CAUSES.items()])


def contradiction(profile: Profile, cluster: Cluster, hours_rate: float = 17.1) -> str:
    """What does not fit in the paper, in numbers counted here: to be shown wherever Table 2 is."""
    flops = family.cost(profile.network, profile.num_classes, profile.size).training_flops
    reached = profile.images_per_second * flops / 1e12
    peak = cluster.gpu.tflops
    return (
        f"Table 2 is for relative scaling only. {profile.images_per_second:.0f} images/s of {profile.network} on one "
        f"GPU are {reached:.0f} TFLOP/s ({flops / 1e9:,.0f} GFLOP a training image): {reached / peak['fp32']:.1f} "
        f"times the A100's FP32 peak, {reached / peak['tf32']:.0%} of its TF32 peak. The same paper's 81 hours for 90 "
        f"epochs of ImageNet-21k on 256 GPUs are {hours_rate:.1f} images/s on each, "
        f"{profile.images_per_second / hours_rate:.1f} times fewer."
    )


def figure(rows: Sequence[Row], published: Mapping[int, float] | None, path: Path, title: str) -> None:
    """Efficiency in percent over GPUs, and images/s; of one size alone, a number. Written to `path`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    gpus = [row.gpus for row in rows]
    drawing = Figure(figsize=(11, 4.4), layout="constrained")
    drawing.suptitle(title, fontsize=10)
    if len(rows) == 1:
        sizes = f"{gpus[0]} GPU{'s' if gpus[0] > 1 else ''}"
        only = f"{rows[0].images_per_second:,.2f} images/s on {sizes}, {rows[0].source}"
        drawing.text(0.5, 0.5, only, ha="center", va="center", fontsize=14)
        picture(drawing, path, dpi=130)
        return
    left, right = drawing.subplots(1, 2)
    ours = {"marker": "o", "color": OURS, "label": rows[0].source}
    theirs = {"marker": "x", "linestyle": "none", "color": THEIRS, "label": "paper, Table 2"}
    percents = {row.gpus: row.efficiency for row in rows}
    left.axhline(100, linestyle="--", color=IDEAL, label="ideal")
    left.plot(gpus, list(percents.values()), **ours)
    _annotate(left, percents, OURS, 8)
    right.plot(gpus, [rows[0].images_per_second / gpus[0] * n for n in gpus], "--", color=IDEAL, label="ideal")
    right.plot(gpus, [row.images_per_second for row in rows], **ours)
    if published:
        rates = {n: rate for n, rate in published.items() if n <= gpus[-1]}
        percents = {n: 100 * rate / published[1] / n for n, rate in rates.items()}
        left.plot(list(percents), list(percents.values()), **theirs)
        _annotate(left, percents, THEIRS, -14)
        right.plot(list(rates), list(rates.values()), **theirs)
    lowest = min(value for line in left.lines[1:] for value in line.get_ydata())
    left.set(ylim=(max(0, lowest // 10 * 10 - 10), 104), ylabel="efficiency E(N), %", title="(a) efficiency")
    right.set(yscale="log", ylabel="images/s", title="(b) throughput")
    for panel in (left, right):
        panel.set(xscale="log", xlabel="GPUs")
        panel.set_xticks(gpus, [str(n) for n in gpus])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right" if panel is right else "lower left")
    picture(drawing, path, dpi=130)


def _annotate(panel: Any, percents: Mapping[int, float], color: str, above: int) -> None:
    for n, percent in percents.items():
        place = {"textcoords": "offset points", "xytext": (0, above), "ha": "center"}
        panel.annotate(f"{percent:.1f}", (n, percent), fontsize=8, color=color, **place)
