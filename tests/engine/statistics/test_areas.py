import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from engine.statistics.areas import Ranked


def by_pairs(truth, scores, weights):
    """The share of weighted pairs in order, by its definition."""
    up, down = truth == 1, truth == 0
    order = (scores[up, None] > scores[down]) + 0.5 * (scores[up, None] == scores[down])
    pairs = weights[up, None] * weights[down]
    return (order * pairs).sum() / pairs.sum()


@pytest.mark.parametrize("digits", [0, 1, 9])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_areas_are_the_share_of_pairs_and_scikit_learns_precision(digits, share):
    rng = np.random.default_rng(0)
    truth = (rng.random(500) < share).astype(float)
    scores = np.round(2 * rng.normal(size=500) + truth, digits)
    groups = rng.integers(0, 200, 500)
    weights = rng.integers(0, 3, (200, 4))
    for dtype in (torch.float32, torch.float64):
        area, average = Ranked.of(truth, scores, groups).areas(torch.tensor(weights, dtype=dtype))
        for column in range(4):
            weight = weights[groups, column]
            assert area[column] == pytest.approx(by_pairs(truth, scores, weight), abs=1e-12)
            assert area[column] == pytest.approx(roc_auc_score(truth, scores, sample_weight=weight), abs=1e-12)
            expected = average_precision_score(truth, scores, sample_weight=weight)
            assert average[column] == pytest.approx(expected, abs=1e-12)


def test_areas_that_do_not_exist():
    for truth in ([1, 1, 1, 1], [0, 0, np.nan, np.nan], [np.nan] * 4):
        for found in Ranked.of(np.array(truth, float), np.arange(4.0), np.arange(4)).areas(torch.ones(4, 2)):
            assert found.shape == (2,) and np.isnan(found).all()
    truth = np.array([0.0, 1, 1, 0])
    without = torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0]])  # only negatives, only positives
    for found in Ranked.of(truth, np.arange(4.0), np.arange(4)).areas(without):
        assert np.isnan(found).all()


def test_one_patient_with_all_images_weighs_all_of_them():
    truth, scores = np.array([0.0, 1, 0, 1]), np.array([0.1, 0.2, 0.3, 0.4])
    area, average = Ranked.of(truth, scores, np.zeros(4, int)).areas(torch.tensor([[1.0, 5.0]]))
    assert area == pytest.approx([0.75, 0.75], abs=1e-15)
    assert average == pytest.approx([5 / 6, 5 / 6], abs=1e-15)


def test_scores_of_infinite_size_are_ranked():
    truth, scores = np.array([0.0, 1, 0, 1]), np.array([-np.inf, np.inf, np.inf, 0])
    area, _ = Ranked.of(truth, scores, np.arange(4)).areas(torch.ones(4, 1))
    assert area == pytest.approx([roc_auc_score(truth, [-9, 9, 9, 0])])
