"""Curves of one label with pointwise 95% bands: ROC, precision over recall, observed over predicted frequency."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.statistics.bootstrap import LEVELS
from engine.statistics.scores import BINS, bin_of

GRID = np.linspace(0, 1, 101)
"""False-positive rates, or recalls, at which bands are drawn."""


@dataclass(frozen=True)
class Curve:
    """A curve, and a band around it."""

    x: np.ndarray  # (m,)
    y: np.ndarray  # (m,)
    at: np.ndarray  # (g,) of the band
    low: np.ndarray  # (g,)
    high: np.ndarray  # (g,)


@dataclass(frozen=True)
class Reliability:
    """What was observed in the bins of predicted probability that hold images, (bins,) each."""

    predicted: np.ndarray  # mean probability
    observed: np.ndarray  # share of positives
    low: np.ndarray
    high: np.ndarray
    images: np.ndarray


def roc_and_precision(
    truth: np.ndarray, scores: np.ndarray, groups: np.ndarray, weights: np.ndarray
) -> tuple[Curve, Curve] | None:
    """ROC curve, and precision over recall, of (n,) truths, scores and groups; bands over the columns of (groups, b)
    weights. None where the known labels have only one value."""
    known = np.flatnonzero(~np.isnan(truth))
    order = known[np.argsort(-scores[known], kind="stable")]
    positive = truth[order] > 0.5
    if positive.all() or not positive.any():
        return None
    ordered = scores[order]
    ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(order) - 1)
    rates, precisions = [], []
    for column in weights[groups[order]].T:
        found, passed = _counts(column, positive, ends)
        if found[-1] and passed[-1]:
            rates.append(np.interp(GRID, np.append(0, passed / passed[-1]), np.append(0, found / found[-1])))
            precisions.append(_at_recalls(found, passed))
    found, passed = _counts(np.ones(len(order)), positive, ends)
    roc = Curve(np.append(0, passed / passed[-1]), np.append(0, found / found[-1]), GRID, *_band(rates))
    return roc, Curve(found / found[-1], found / (found + passed), GRID, *_band(precisions))


def _counts(weights: np.ndarray, positive: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted positives and negatives from each distinct score on."""
    found = np.cumsum(weights * positive, dtype=np.float64)[ends]
    return found, np.cumsum(weights, dtype=np.float64)[ends] - found


def _at_recalls(found: np.ndarray, passed: np.ndarray) -> np.ndarray:
    """The precision where each recall of GRID is reached; that of 0 where anything is found."""
    reached = np.searchsorted(found, np.maximum(GRID * found[-1] - 1e-9, 0.5))
    return found[reached] / (found[reached] + passed[reached])


def _band(curves: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    if not curves:
        return np.full(len(GRID), np.nan), np.full(len(GRID), np.nan)
    low, high = np.quantile(curves, LEVELS, axis=0)
    return low, high


def reliability(truth: np.ndarray, probabilities: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> Reliability:
    """Of (n,) truths, probabilities and groups; intervals over the columns of (groups, b) weights."""
    known = ~np.isnan(truth)
    truth, probabilities, groups = truth[known], probabilities[known], groups[known]
    bins = bin_of(probabilities)
    place = bins * len(weights) + groups

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(place, values, BINS * len(weights)).reshape(BINS, len(weights))

    counts, positives = total(np.ones(len(truth))), total(truth)
    images = counts.sum(1)
    filled = images > 0
    there, found = counts[filled] @ weights, positives[filled] @ weights
    shares = np.divide(found, there, out=np.full_like(found, np.nan), where=there > 0)
    low, high = np.nanquantile(shares, LEVELS, axis=1) if shares.size else np.empty((2, int(filled.sum())))
    return Reliability(
        total(probabilities)[filled].sum(1) / images[filled], positives[filled].sum(1) / images[filled], low, high,
        images[filled],
    )  # fmt: skip
