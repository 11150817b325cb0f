import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import precision_recall_curve, roc_curve

from engine.statistics import bootstrap, curves
from engine.statistics.scores import BINS


def case(seed=0, n=300, groups=60):
    rng = np.random.default_rng(seed)
    truth = (rng.random(n) < 0.3).astype(float)
    probabilities = np.round(0.4 * truth + 0.6 * rng.random(n), 2)
    truth[rng.random(n) < 0.1] = np.nan
    weights = np.concatenate(list(bootstrap.resamples(groups, 300, 0)), axis=1)
    return truth, probabilities, rng.integers(0, groups, n), weights


def test_curves_are_scikit_learns():
    truth, scores, groups, weights = case()
    known = ~np.isnan(truth)
    roc, precision = curves.roc_and_precision(truth, scores, groups, weights)
    rate, found, _ = roc_curve(truth[known], scores[known], drop_intermediate=False)
    assert roc.x == pytest.approx(rate) and roc.y == pytest.approx(found)
    expected, recall, _ = precision_recall_curve(truth[known], scores[known])
    assert precision.x == pytest.approx(recall[-2::-1]) and precision.y == pytest.approx(expected[-2::-1])


def test_bands_are_of_curves_drawn_by_hand():
    truth, scores, groups, weights = case()
    known = ~np.isnan(truth)
    roc, precision = curves.roc_and_precision(truth, scores, groups, weights)
    rates, precisions = [], []
    for column in weights.T:
        rows = np.repeat(np.flatnonzero(known), column[groups[known]].astype(int))
        rate, found, _ = roc_curve(truth[rows], scores[rows], drop_intermediate=False)
        rates.append(np.interp(0.3, rate, found))
        expected, recall, _ = precision_recall_curve(truth[rows], scores[rows])
        precisions.append(expected[recall >= 0.5][-1])
    for curve, at, values in ((roc, 0.3, rates), (precision, 0.5, precisions)):
        place = np.flatnonzero(np.isclose(curve.at, at))[0]
        assert (curve.low[place], curve.high[place]) == pytest.approx(np.quantile(values, (0.025, 0.975)), abs=1e-9)
    assert (roc.low <= roc.high).all() and (precision.low <= precision.high).all()


def test_one_value_has_no_curves():
    truth, scores, groups, weights = case()
    for value in (0.0, 1.0, np.nan):
        assert curves.roc_and_precision(np.full(len(truth), value), scores, groups, weights) is None


def test_reliability_is_scikit_learns_with_intervals_around():
    truth, probabilities, groups, weights = case()
    known = ~np.isnan(truth)
    found = curves.reliability(truth, probabilities, groups, weights)
    observed, predicted = calibration_curve(truth[known], probabilities[known] + 1e-12, n_bins=BINS)
    assert found.observed == pytest.approx(observed) and found.predicted == pytest.approx(predicted)
    assert found.images.sum() == known.sum()
    assert (found.low <= found.observed + 1e-9).mean() > 0.9 and (found.high >= found.observed - 1e-9).mean() > 0.9
    nothing = curves.reliability(np.full(3, np.nan), np.zeros(3), np.arange(3), np.ones((3, 2)))
    assert len(nothing.images) == len(nothing.low) == 0
