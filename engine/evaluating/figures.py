"""Evaluations as figures: ROC and precision over recall with bands, reliability, confusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine import whole
from engine.evaluating.evaluation import Evaluation
from engine.statistics import bootstrap, curves
from engine.statistics.scores import AUC, CALIBRATION, PRECISION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00")
"""Of the first and the second predictions: of Okabe and Ito's palette, told apart by colour-blind readers too."""
LINES = ("-", "--")
MARKS = ("o", "s")
LOOKS = ("blue, solid, round", "orange, dashed, square")
MOST = 16
"""Labels that have a panel: those with most positives."""
RESAMPLES = 200
"""For bands."""
NUMBERED = 20
"""Up to so many classes the counts are written into the confusion matrix."""
_SIDE = 2.7  # of a panel, inches
_NAME: dict[str, Any] = {"fontsize": 9, "parse_math": False}
"""Of titles that hold names, in which a dollar is a dollar."""


def save(evaluations: Sequence[Evaluation], folder: Path, kind: str, seed: int) -> list[Path]:
    """Draw the figures of one or two evaluations of the same images as files that end in `kind`; their paths."""
    drawn = {"roc": _roc(evaluations, seed), "precision-recall": _precision(evaluations, seed),
             "reliability": _reliability(evaluations, seed)}  # fmt: skip
    for index, one in enumerate(evaluations):
        if one.images.said is not None:
            name = "confusion" if len(evaluations) == 1 else f"confusion-{index + 1}"
            drawn[name] = confusion(one) if not one.images.many else confusion_of_labels(one)
    paths = []
    for name, figure in drawn.items():
        paths.append(folder / f"{name}.{kind}")
        whole.picture(figure, paths[-1], dpi=150)
    return paths


def _shown(evaluation: Evaluation) -> list[int]:
    """The labels that have a panel, in their order."""
    labels = range(evaluation.labels)
    most = sorted(labels, key=lambda row: -evaluation.counts(row)[0])[:MOST]
    return sorted(most)


def _panels(
    evaluations: Sequence[Evaluation], title: str, draw: Callable[[Any, Evaluation, int, dict], bool]
) -> Figure:
    """A figure with a panel for each label; `draw` says whether there was anything to draw."""
    from matplotlib.figure import Figure

    shown = _shown(evaluations[0])
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(_SIDE * across + 0.4, _SIDE * down + 0.9), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for axes, row in zip(panels.flat, shown, strict=False):
        axes.set_title(evaluations[0].rows[row], **_NAME)
        for one, colour, line in zip(evaluations, COLOURS, LINES, strict=False):
            if not draw(axes, one, row, {"color": colour, "linestyle": line}):
                axes.text(0.5, 0.5, "one value only", ha="center", va="center", color="0.4", transform=axes.transAxes)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7, handlelength=1.6, loc="best")
    for axes in panels.flat[len(shown) :]:
        axes.remove()
    labels = evaluations[0].labels
    some = f"; {len(shown)} of {labels:,} labels, those with most positives" if labels > len(shown) else ""
    names = ""
    if len(evaluations) > 1:
        names = "\n" + "; ".join(f"{one.title} {look}" for one, look in zip(evaluations, LOOKS, strict=True))
    figure.suptitle(title + some + names, **_NAME)
    return figure


def _weights(evaluation: Evaluation, seed: int) -> np.ndarray:
    return np.concatenate(list(bootstrap.resamples(evaluation.images.count, RESAMPLES, seed)), axis=1)


def _curves(evaluation: Evaluation, row: int, weights: np.ndarray) -> tuple[curves.Curve, curves.Curve] | None:
    images = evaluation.images
    return curves.roc_and_precision(images.truth[:, row], images.probabilities[:, row], images.groups, weights)


def _line(axes: Any, curve: curves.Curve, look: dict, label: str, steps: bool) -> None:
    style = "steps-pre" if steps else "default"
    axes.fill_between(curve.at, curve.low, curve.high, color=look["color"], alpha=0.18, linewidth=0)
    axes.plot(curve.x, curve.y, **look, linewidth=1.2, drawstyle=style, label=label)


def _roc(evaluations: Sequence[Evaluation], seed: int) -> Figure:
    weights = _weights(evaluations[0], seed)

    def draw(axes: Any, one: Evaluation, row: int, look: dict) -> bool:
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle=(0, (1, 1)))
        found = _curves(one, row, weights)
        if found:
            _line(axes, found[0], look, _said("AUC", one, AUC, row), steps=False)
        axes.set_xlabel("1 - specificity", fontsize=8)
        axes.set_ylabel("sensitivity", fontsize=8)
        return found is not None

    return _panels(evaluations, f"ROC; bands: 95%, pointwise, {RESAMPLES} resamples", draw)


def _precision(evaluations: Sequence[Evaluation], seed: int) -> Figure:
    weights = _weights(evaluations[0], seed)

    def draw(axes: Any, one: Evaluation, row: int, look: dict) -> bool:
        found = _curves(one, row, weights)
        if found:
            positives, known = one.counts(row)
            axes.axhline(positives / known, color="0.7", linewidth=0.8, linestyle=(0, (1, 1)))
            _line(axes, found[1], look, _said("AUPRC", one, PRECISION, row), steps=True)
        axes.set_xlabel("recall", fontsize=8)
        axes.set_ylabel("precision", fontsize=8)
        return found is not None

    return _panels(evaluations, f"precision over recall; bands: 95%, pointwise, {RESAMPLES} resamples", draw)


def _said(what: str, one: Evaluation, metric: str, row: int) -> str:
    found = one.estimate(metric, row)
    return f"{what} {found.value:.2f} ({found.low:.2f}–{found.high:.2f})"


def _reliability(evaluations: Sequence[Evaluation], seed: int) -> Figure:
    weights = _weights(evaluations[0], seed)

    def draw(axes: Any, one: Evaluation, row: int, look: dict) -> bool:
        images = one.images
        truth, probabilities = images.truth[:, row], images.probabilities[:, row]
        found = curves.reliability(truth, probabilities, images.groups, weights)
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle=(0, (1, 1)))
        if len(found.images):
            off = np.maximum([found.observed - found.low, found.high - found.observed], 0)
            mark = MARKS[LINES.index(look["linestyle"])]
            axes.errorbar(found.predicted, found.observed, off, fmt="none", ecolor=look["color"], elinewidth=0.8)
            size = 6 + 60 * np.sqrt(found.images / found.images.sum())
            label = f"ECE {one.values[CALIBRATION][row, 0]:.3f}"
            axes.scatter(found.predicted, found.observed, size, color=look["color"], marker=mark, label=label)
        axes.set_xlabel("predicted probability", fontsize=8)
        axes.set_ylabel("observed frequency", fontsize=8)
        return len(found.images) > 0

    return _panels(evaluations, f"reliability; larger: more images; intervals: 95%, {RESAMPLES} resamples", draw)


def confusion(evaluation: Evaluation) -> Figure:
    """Classes over the most probable classes: counts, shaded by their share of a row."""
    from matplotlib.figure import Figure

    images, names = evaluation.images, evaluation.rows[: evaluation.labels]
    known = ~np.isnan(images.truth[:, 0])
    counts = np.zeros((len(names), len(names)), np.int64)
    np.add.at(counts, (images.truth[known].argmax(1), images.probabilities[known].argmax(1)), 1)
    side = min(3 + 0.45 * len(names), 14)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    shade = _matrix(axes, counts, numbered=len(names) <= NUMBERED)
    if len(names) <= 4 * NUMBERED:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    axes.set(xlabel="most probable class", ylabel="class")
    axes.set_title(evaluation.title, **_NAME)
    figure.colorbar(shade, ax=axes, label="share of a class's images", shrink=0.8)
    return figure


def confusion_of_labels(evaluation: Evaluation) -> Figure:
    """A matrix of two by two for each label: whether it is there, and whether it was said to be."""
    from matplotlib.figure import Figure

    shown, images = _shown(evaluation), evaluation.images
    assert images.said is not None
    across = min(6, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(1.7 * across + 0.4, 1.9 * down + 0.5), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for axes, row in zip(panels.flat, shown, strict=False):
        truth, said = images.truth[:, row], images.said[:, row]
        known = ~np.isnan(truth) & ~np.isnan(said)
        counts = np.zeros((2, 2), np.int64)
        np.add.at(counts, (truth[known].astype(int), said[known].astype(int)), 1)
        _matrix(axes, counts, numbered=True)
        axes.set_xticks((0, 1), ("said no", "said yes"), fontsize=7)
        axes.set_yticks((0, 1), ("is not", "is"), fontsize=7)
        axes.set_title(evaluation.rows[row], **_NAME)
    for axes in panels.flat[len(shown) :]:
        axes.remove()
    figure.suptitle(evaluation.title, **_NAME)
    return figure


def _matrix(axes: Any, counts: np.ndarray, numbered: bool) -> Any:
    """Counts as a picture, shaded by their share of a row."""
    total = counts.sum(1, keepdims=True)
    shares = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    shade = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts) if numbered else ():
        colour = "white" if shares[row, column] > 0.6 else "black"
        axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=7, color=colour)
    return shade
