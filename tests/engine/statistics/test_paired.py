import itertools

import numpy as np
import pytest
from scipy import stats

from engine.statistics.paired import difference, holm


def test_a_paired_t_test_over_common_seeds_is_scipys():
    rng = np.random.RandomState(0)
    ours, theirs = rng.randn(6) + 1, rng.randn(6)
    one = difference(dict(enumerate(ours)) | {9: 100.0}, dict(enumerate(theirs)) | {8: -100.0})
    expected = stats.ttest_rel(ours, theirs)
    interval = expected.confidence_interval(0.95)
    assert one.p == pytest.approx(expected.pvalue)
    assert (one.low, one.high) == pytest.approx((interval.low, interval.high))
    assert (one.mean, one.seeds) == (pytest.approx(np.mean(ours - theirs)), 6)


def test_differences_without_spread_and_without_seeds():
    same = difference({0: 5.0, 1: 7.0}, {0: 5.0, 1: 7.0})
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert difference({0: 6.0, 1: 8.0}, {0: 5.0, 1: 7.0}).p == 0
    assert difference({0: 1.0}, {0: 2.0}) is None
    assert difference({0: 1.0, 1: 2.0}, {2: 2.0, 3: 3.0}) is None


def test_holm_rejects_what_its_steps_reject():
    """By definition: the smallest against level / m, the next against level / (m - 1), up to the first that fails."""
    values = [0.01, 0.04, 0.03, 0.005, 0.2]
    adjusted = holm(values)
    for level in np.linspace(0.001, 1, 400):
        rejected = set()
        for rank, index in enumerate(np.argsort(values)):
            if values[index] > level / (len(values) - rank):
                break
            rejected.add(int(index))
        assert {index for index, value in enumerate(adjusted) if value <= level} == rejected
    assert all(a <= b for (_, a), (_, b) in itertools.pairwise(sorted(zip(values, adjusted, strict=True))))
    assert holm([]) == []
