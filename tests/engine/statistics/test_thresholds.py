import numpy as np
import pytest
from sklearn.metrics import recall_score, roc_curve

from engine.statistics import thresholds


def case(seed=0):
    rng = np.random.default_rng(seed)
    truth = (rng.random(200) < 0.3).astype(float)
    scores = np.round(rng.normal(size=200) + truth, 1)
    return truth, scores


def test_youdens_threshold_is_scikit_learns_best():
    truth, scores = case()
    rate, found, levels = roc_curve(truth, scores, drop_intermediate=False)
    assert thresholds.youden(truth, scores) == levels[np.argmax(found - rate)]


@pytest.mark.parametrize("wanted", [0.1, 0.9, 0.95, 1.0])
def test_the_threshold_for_a_sensitivity_is_the_highest_that_has_it(wanted):
    truth, scores = case()
    found = thresholds.for_sensitivity(truth, scores, wanted)
    assert recall_score(truth, scores >= found) >= wanted
    assert recall_score(truth, scores > found) < wanted


def test_unknown_labels_do_not_count_and_one_value_has_none():
    truth, scores = case()
    truth[scores > 2.5] = np.nan
    assert thresholds.youden(truth, scores) <= 2.5
    for one in (np.ones(5), np.zeros(5), np.full(5, np.nan)):
        assert np.isnan(thresholds.youden(one, np.arange(5.0)))
        assert np.isnan(thresholds.for_sensitivity(one, np.arange(5.0), 0.9))
