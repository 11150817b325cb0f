import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn.metrics import log_loss

from engine.statistics import temperature
from loaders.errors import UserError


def classes(true_temperature, n=4000, seed=0):
    """Labels drawn from probabilities; what is predicted is too sure by `true_temperature`."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(n, 3))
    truth = np.array([rng.multinomial(1, row) for row in softmax(logits, axis=1)], float)
    return truth, softmax(true_temperature * logits, axis=1)


def labels(true_temperature, n=4000, seed=0):
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(n, 3))
    truth = (rng.random((n, 3)) < expit(logits)).astype(float)
    truth[rng.random((n, 3)) < 0.1] = np.nan
    return truth, expit(true_temperature * logits)


@pytest.mark.parametrize("expected", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("case", "many"), [(classes, False), (labels, True)])
def test_the_temperature_that_made_them_too_sure_is_found(case, many, expected):
    truth, probabilities = case(expected)
    found = temperature.fit(truth, probabilities, many)
    assert found == pytest.approx(expected, rel=0.1)
    known = ~np.isnan(truth)

    def loss(value):
        scaled = temperature.apply(probabilities, value, many)
        if not many:
            return log_loss(truth, scaled)
        return log_loss(truth[known], scaled[known])

    assert loss(found) <= min(loss(found * 1.01), loss(found / 1.01), loss(1.0))
    assert abs(loss(found * 1.0001) - loss(found / 1.0001)) < 1e-7


def test_probabilities_are_those_of_divided_logits():
    logits = np.random.default_rng(0).normal(size=(5, 3))
    for many, link in ((True, expit), (False, lambda z: softmax(z, axis=1))):
        assert temperature.apply(link(logits), 2.5, many) == pytest.approx(link(logits / 2.5), abs=1e-14)
        assert temperature.apply(link(logits), 1, many) == pytest.approx(link(logits), abs=1e-14)


@pytest.mark.parametrize("many", [True, False])
def test_probabilities_of_nought_and_one_stay_finite(many):
    probabilities = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    for value in (0.3, 1, 4):
        found = temperature.apply(probabilities, value, many)
        assert np.isfinite(found).all() and found[0, 0] > 0.99
    truth = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert temperature.fit(truth, probabilities, many) > 10


def test_what_no_temperature_fits_is_told():
    truth, probabilities = np.eye(2)[[0, 1, 1]], np.array([[0.6, 0.4], [0.3, 0.7], [0.4, 0.6]])
    for many in (True, False):
        with pytest.raises(UserError, match="predicted too well"):
            temperature.fit(truth, probabilities, many)
        with pytest.raises(UserError, match="or worse than by chance"):
            temperature.fit(1 - truth, probabilities, many)
        with pytest.raises(UserError, match="no label is known"):
            temperature.fit(np.full((3, 2), np.nan), probabilities, many)
