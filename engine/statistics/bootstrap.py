"""The bootstrap over groups: patients are drawn with replacement, each with all of its images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

LEVELS = (0.025, 0.975)
AT_ONCE = 64
"""Resamples in a block: so few that what is computed for a label stays near the processor."""
Found = TypeVar("Found")


def resamples(groups: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of (groups, b) float32: how often a group is in a resample, `count` in all. Equal seeds draw equally."""
    return (_draw(groups, seed, start, count) for start in range(0, count, AT_ONCE))


def over_resamples(
    call: Callable[[np.ndarray], Found],
    groups: int,
    count: int,
    seed: int,
    advance: Callable[[int], None] | None = None,
) -> list[Found]:
    """What `call` makes of each block of `resamples`: as many at once as torch may have threads, of which each call
    then has one (threads that wait for each other in each operation take longer than the work). `advance` is told of so
    many resamples that are done."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            starts, found = range(0, count, AT_ONCE), []
            for each in pool.map(lambda start: call(_draw(groups, seed, start, count)), starts):
                found.append(each)
                if advance is not None:
                    advance(min(AT_ONCE, count - AT_ONCE * (len(found) - 1)))
            return found
        finally:
            torch.set_num_threads(threads)  # the setting is also what new threads begin with


def _draw(groups: int, seed: int, start: int, count: int) -> np.ndarray:
    """The block that begins with resample `start`."""
    size = min(AT_ONCE, count - start)
    drawn = np.random.default_rng((seed, start)).integers(0, groups, (size, groups))
    drawn += groups * np.arange(size)[:, None]
    times = np.bincount(drawn.ravel(), minlength=groups * size).reshape(size, groups)
    return np.ascontiguousarray(times.T, np.float32)


def interval(replicates: np.ndarray) -> tuple[float, float, int]:
    """95% percentile interval of (b,) replicates, NaN where there is none, and how many had a value."""
    found = replicates[~np.isnan(replicates)]
    if not len(found):
        return float("nan"), float("nan"), 0
    low, high = np.quantile(found, LEVELS)
    return float(low), float(high), len(found)
