"""Differences between two sources on the same seeds: mean, interval, and how probable they would be without one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """Of scores, seed by seed."""

    mean: float  # points
    low: float  # of the 95% interval of the paired t-test
    high: float
    p: float  # two-sided, of the same test
    seeds: int


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Of two sources' scores by seed, over the seeds that both have; None of fewer than two."""
    from scipy.stats import t  # hundreds of files: opened when two sources are compared

    both = sorted(set(ours) & set(theirs))
    each = [ours[seed] - theirs[seed] for seed in both]
    if len(each) < 2:
        return None
    mean, error = statistics.fmean(each), statistics.stdev(each) / math.sqrt(len(each))
    reach = float(t.ppf(0.975, len(each) - 1)) * error
    p = 2 * float(t.sf(abs(mean) / error, len(each) - 1)) if error else float(mean == 0)
    return Difference(mean, mean - reach, mean + reach, p, len(each))


def holm(values: Sequence[float]) -> list[float]:
    """Probabilities of several tests, such that one below 0.05 is 1 in 20 over all of them (Holm, 1979)."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, values[index] * (len(values) - rank)))
        adjusted[index] = largest
    return adjusted
