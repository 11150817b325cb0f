"""DeLong's test: do two scores of the same images differ in their ROC AUC?

DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988), 837-845. Images of one patient are no independent witnesses:
where groups have several, the variance is that of Obuchowski, Biometrics 53 (1997), 567-578, which is DeLong's where
each has one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Comparison:
    """Two areas, and whether they differ."""

    ours: float
    theirs: float
    error: float  # standard error of the difference
    z: float
    p: float  # two-sided


def compare(truth: np.ndarray, ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray) -> Comparison | None:
    """From (n,) truths of 0, 1 or NaN for unknown, (n,) scores of each, and (n,) int64 groups.

    None where the known images have no two groups with positives and two with negatives.
    """
    known = ~np.isnan(truth)
    positive, groups = truth[known] > 0.5, np.unique(groups[known], return_inverse=True)[1]
    count = groups.max(initial=-1) + 1
    m, n = int(positive.sum()), int((~positive).sum())
    with_positives, with_negatives = (len(np.unique(groups[chosen])) for chosen in (positive, ~positive))
    if with_positives < 2 or with_negatives < 2:
        return None
    areas, of_positives, of_negatives = [], [], []
    for scores in (ours[known], theirs[known]):
        placed_positives, placed_negatives = placements(positive, scores)
        area = float(placed_positives.mean())
        areas.append(area)
        of_positives.append(np.bincount(groups[positive], placed_positives - area, count))
        of_negatives.append(np.bincount(groups[~positive], placed_negatives - area, count))
    a, b = of_positives[0] - of_positives[1], of_negatives[0] - of_negatives[1]
    variance = (
        with_positives / (with_positives - 1) * (a @ a) / m**2
        + with_negatives / (with_negatives - 1) * (b @ b) / n**2
        + 2 * count / (count - 1) * (a @ b) / (m * n)
    )
    error, off = math.sqrt(max(variance, 0.0)), areas[0] - areas[1]
    if not error:
        return Comparison(areas[0], areas[1], 0.0, math.copysign(math.inf, off) if off else 0.0, float(off == 0))
    z = off / error
    return Comparison(areas[0], areas[1], error, z, math.erfc(abs(z) / math.sqrt(2)))


def placements(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each positive the share of negatives below it, of each negative the share of positives above it; of equal
    scores one half. From (n,) bool and (n,) scores."""
    up, down = np.sort(scores[positive]), np.sort(scores[~positive])

    def share(among: np.ndarray, of: np.ndarray) -> np.ndarray:
        return (np.searchsorted(among, of, "left") + np.searchsorted(among, of, "right")) / (2 * len(among))

    return share(down, scores[positive]), 1 - share(up, scores[~positive])
