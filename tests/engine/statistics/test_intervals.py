import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import roc_auc_score

from engine.statistics import intervals


def case(seed, n=120, labels=3):
    """Scores with many ties, labels with unknown ones."""
    rng = np.random.RandomState(seed)
    truth = (rng.rand(n, labels) < 0.4).astype(float)
    scores = np.round(truth * rng.rand(n, labels) + rng.rand(n, labels), 1)
    truth[rng.rand(n, labels) < 0.2] = np.nan
    return truth, scores


def test_a_mean_area_that_does_not_exist():
    assert np.isnan(intervals.of_mean_auc(np.full((4, 2), np.nan), np.zeros((4, 2)))).all()


def test_the_interval_of_a_share_is_scipys_percentile_bootstrap():
    hits = np.arange(200) < 130
    expected = bootstrap((hits.astype(float),), np.mean, method="percentile", n_resamples=20_000, rng=0)
    low, high = intervals.of_share(130, 200)
    assert (low, high) == pytest.approx([100 * each for each in expected.confidence_interval], abs=0.51)
    assert intervals.of_share(200, 200) == (100, 100)
    assert intervals.of_share(0, 7) == (0, 0)


def test_the_interval_of_a_mean_area_is_that_of_resampling_by_hand():
    truth, scores = case(3)
    rng = np.random.RandomState(5)
    means = []
    for _ in range(400):
        rows = rng.randint(0, len(truth), len(truth))
        known = [~np.isnan(truth[rows, k]) for k in range(3)]
        means.append(np.mean([roc_auc_score(truth[rows, k][known[k]], scores[rows, k][known[k]]) for k in range(3)]))
    low, high = intervals.of_mean_auc(truth, scores)
    assert (low, high) == pytest.approx(100 * np.quantile(means, [0.025, 0.975]), abs=1.2)
    assert (low, high) == intervals.of_mean_auc(truth, scores)
