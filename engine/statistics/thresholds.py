"""From which probability on a label is said to be there: chosen on other data than it is used on."""

from __future__ import annotations

import numpy as np


def youden(truth: np.ndarray, scores: np.ndarray) -> float:
    """The threshold with the largest sum of sensitivity and specificity (Youden, 1950), the highest of several.

    truth (n,) of 0, 1, or NaN for unknown; scores (n,). NaN where the known labels have only one value.
    """
    levels, sensitivity, passed = _steps(truth, scores)
    return float(levels[(sensitivity - passed).argmax()]) if len(levels) else float("nan")


def for_sensitivity(truth: np.ndarray, scores: np.ndarray, wanted: float) -> float:
    """The highest threshold with at least the sensitivity that is `wanted`, in 0..1; else as `youden`."""
    levels, sensitivity, _ = _steps(truth, scores)
    return float(levels[np.argmax(sensitivity >= wanted - 1e-12)]) if len(levels) else float("nan")


def _steps(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each distinct score, the highest first: it, the share of positives from it on, and that of negatives."""
    known = ~np.isnan(truth)
    positive, scores = truth[known] > 0.5, scores[known]
    if positive.all() or not positive.any():
        return np.empty(0), np.empty(0), np.empty(0)
    order = np.argsort(-scores, kind="stable")
    positive, scores = positive[order], scores[order]
    ends = np.append(np.flatnonzero(scores[1:] != scores[:-1]), len(scores) - 1)
    found, passed = positive.cumsum()[ends], (~positive).cumsum()[ends]
    return scores[ends], found / positive.sum(), passed / (~positive).sum()
