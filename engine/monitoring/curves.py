"""The curves of a run as a picture: loss, learning rate, evaluation over its steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import whole
from engine.monitoring.metrics import read

TRAINING, EVALUATION, AUC, RATE, MAJORITY = "tab:blue", "tab:orange", "tab:green", "0.25", "0.6"
"""A colour for each thing, the same in all panels."""
SCORES = {"top1": ("top-1", EVALUATION), "mean_auc": ("mean AUC", AUC)}


def plot(metrics: Path, picture: Path, title: str, majority: float | None = None) -> None:
    """Draw the events of a metrics.jsonl. What was not measured has no panel; of one step there is a number, no curve.

    majority: share of the evaluation set's most frequent class, percent, drawn beside the top-1.
    """
    from matplotlib.figure import Figure

    events = read(metrics)
    train = [event for event in events if event["kind"] == "train"]
    val = [event for event in events if event["kind"] == "val"]
    figure = Figure(figsize=(11 if val else 7.5, 3.6), layout="constrained")
    panels = figure.subplots(1, 3 if val else 2)
    _loss(panels[0], train, val)
    _rate(panels[1], train)
    if val:
        _scores(panels[2], val, majority)
    figure.suptitle(title)
    whole.picture(figure, picture)


def stairs(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """A curve with a corner wherever a constant stretch ends in a fall or begins with one: a schedule of steps falls at
    once, and not from one logged step to the next."""
    flat = [values[at] == values[at + 1] for at in range(len(values) - 1)]
    xs, ys = [*steps[:1]], [*values[:1]]
    for at, (step, value) in enumerate(zip(steps[1:], values[1:], strict=True)):
        if value < ys[-1] and any(flat[max(at - 1, 0) : at + 2]):
            xs.append(step)
            ys.append(ys[-1])
        xs.append(step)
        ys.append(value)
    return xs, ys


def _loss(axes: Any, train: Sequence[dict], val: Sequence[dict]) -> None:
    if len(train) < 2 and len(val) < 2:
        found = [(name, events[0]) for name, events in (("training", train), ("evaluation", val)) if events]
        _number(axes, [f"{name} loss {event['loss']:.4g}, step {event['step']}" for name, event in found])
        return
    axes.plot(*_points(train, "loss"), color=TRAINING, label="training", lw=1)
    if val:
        axes.plot(*_points(val, "loss"), "o-", color=EVALUATION, ms=3, label="evaluation")
    axes.legend()
    _labelled(axes, "loss")


def _rate(axes: Any, train: Sequence[dict]) -> None:
    if len(train) < 2:
        _number(axes, [f"learning rate {event['learning_rate']:.4g}, step {event['step']}" for event in train])
        return
    axes.plot(*stairs(*_points(train, "learning_rate")), color=RATE, lw=1)
    _labelled(axes, "learning rate")


def _scores(axes: Any, val: Sequence[dict], majority: float | None) -> None:
    shown = {name: look for name, look in SCORES.items() if any(name in event for event in val)}
    share = majority if "top1" in shown else None
    if len(val) < 2:
        said = [f"{label} {val[0][name]:.2f}%" for name, (label, _) in shown.items()]
        said += [] if share is None else [f"majority class {share:.2f}%"]
        _number(axes, [*said, f"step {val[0]['step']}"])
        return
    for name, (label, colour) in shown.items():
        axes.plot(*_points([event for event in val if name in event], name), "o-", color=colour, ms=3, label=label)
    if share is not None:
        axes.axhline(share, color=MAJORITY, linestyle="--", lw=1, label="majority class")
    axes.legend()
    _labelled(axes, "evaluation, %")


def _points(events: Sequence[dict], name: str) -> tuple[list[float], list[float]]:
    return [event["step"] for event in events], [event[name] for event in events]


def _labelled(axes: Any, what: str) -> None:
    axes.set(xlabel="step", ylabel=what)
    axes.grid(alpha=0.3)


def _number(axes: Any, lines: Sequence[str]) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", fontsize=12, transform=axes.transAxes)
