import math

import numpy as np
import pytest
from scipy.stats import norm

from engine.statistics.delong import compare, placements

OVARIAN = """
3.0 5.8 10 0   3.2 6.3  5 1   3.9 6.8  3 1   2.8 4.8  6 0   3.2 5.8  3 1   0.9 4.0  5 0   2.5 5.7  8 0   1.6 5.6  5 1
3.8 5.7  5 1   3.7 6.7  6 1   3.2 5.4  4 1   3.8 6.6  6 1   4.1 6.6  5 1   3.6 5.7  5 1   4.3 7.0  4 1   3.6 6.7  4 0
2.3 4.4  6 1   4.2 7.6  4 0   4.0 6.6  6 0   3.5 5.8  6 1   3.8 6.8  7 1   3.0 4.7  8 0   4.5 7.4  5 1   3.7 7.4  5 1
3.1 6.6  6 1   4.1 8.2  6 1   4.3 7.0  5 1   4.3 6.5  4 1   3.2 5.1  5 1   2.6 4.7  6 1   3.3 6.8  6 0   1.7 4.0  7 0
3.7 6.1  5 1   3.3 6.3  7 1   4.2 7.7  6 1   3.5 6.2  5 1   2.9 5.7  9 0   2.1 4.8  7 1   2.8 6.2  8 0   4.0 7.0  7 1
3.3 5.7  6 1   3.7 6.9  5 1   3.6 6.6  5 1
"""
"""Albumin, total protein, K-G score and outcome of the patients of DeLong et al. (1988) without missing values, as in
SAS/STAT's manual, LOGISTIC procedure, Example 72.8, "Comparing Receiver Operating Characteristic Curves"."""


def test_the_data_of_delong_give_what_sas_publishes():
    albumin, protein, score, outcome = np.array(OVARIAN.split(), float).reshape(-1, 4).T
    healthy = 10 - score
    alone = np.arange(len(outcome))
    first, second = compare(outcome, albumin, healthy, alone), compare(outcome, protein, healthy, alone)
    assert [round(area, 4) for area in (first.ours, first.theirs, second.ours)] == [0.7366, 0.7258, 0.6478]
    found = [(round(one.ours - one.theirs, 4), round(one.error, 4), round(one.z**2, 4), round(one.p, 4))
             for one in (first, second)]  # fmt: skip
    assert found == [(0.0108, 0.0953, 0.0127, 0.9102), (-0.0780, 0.1046, 0.5554, 0.4561)]


def case(seed, n=90, digits=1):
    rng = np.random.default_rng(seed)
    truth = (rng.random(n) < 0.4).astype(float)
    ours, theirs = (np.round(truth + rng.normal(size=n) * spread, digits) for spread in (1.0, 1.6))
    return truth, ours, theirs


def by_definition(truth, ours, theirs):
    """The equations of DeLong et al., pair by pair."""
    areas, tens, ones = [], [], []
    for scores in (ours, theirs):
        up, down = scores[truth == 1], scores[truth == 0]
        kernel = np.array([[1.0 if x > y else 0.5 if x == y else 0.0 for y in down] for x in up])
        areas.append(kernel.mean())
        tens.append(kernel.mean(1))
        ones.append(kernel.mean(0))
    covariance = np.cov(tens) / len(tens[0]) + np.cov(ones) / len(ones[0])
    error = math.sqrt(np.array([1, -1]) @ covariance @ np.array([1, -1]))
    return areas, error, 2 * norm.sf(abs(areas[0] - areas[1]) / error)


@pytest.mark.parametrize("digits", [0, 1, 8])
def test_it_is_the_definition(digits):
    truth, ours, theirs = case(digits, digits=digits)
    (area, other), error, p = by_definition(truth, ours, theirs)
    found = compare(truth, ours, theirs, np.arange(len(truth)))
    assert (found.ours, found.theirs, found.error, found.p) == pytest.approx((area, other, error, p), abs=1e-12)
    assert found.z == pytest.approx((area - other) / error, abs=1e-10)
    mirrored = compare(truth, theirs, ours, np.arange(len(truth)))
    assert (mirrored.z, mirrored.p) == pytest.approx((-found.z, found.p))


def test_unknown_labels_do_not_count():
    truth, ours, theirs = case(3)
    some = np.where(np.arange(len(truth)) % 4 == 0, np.nan, truth)
    known = ~np.isnan(some)
    expected = compare(truth[known], ours[known], theirs[known], np.arange(known.sum()))
    assert compare(some, ours, theirs, np.arange(len(truth))) == expected


def obuchowski(truth, ours, theirs, groups):
    """Obuchowski's equations (1997), sums over clusters one by one."""
    up, down = truth == 1, truth == 0
    m, n, clusters = up.sum(), down.sum(), np.unique(groups)
    x, y = np.zeros((len(clusters), 2)), np.zeros((len(clusters), 2))
    for r, scores in enumerate((ours, theirs)):
        kernel = (scores[up, None] > scores[down]) + 0.5 * (scores[up, None] == scores[down])
        area = kernel.mean()
        for i, cluster in enumerate(clusters):
            x[i, r] = (kernel.mean(1)[groups[up] == cluster] - area).sum()
            y[i, r] = (kernel.mean(0)[groups[down] == cluster] - area).sum()
    i10, i01, i = len(np.unique(groups[up])), len(np.unique(groups[down])), len(clusters)
    s10, s01, s11 = i10 / ((i10 - 1) * m) * x.T @ x, i01 / ((i01 - 1) * n) * y.T @ y, i / (i - 1) * x.T @ y
    covariance = s10 / m + s01 / n + (s11 + s11.T) / (m * n)
    return math.sqrt(np.array([1, -1]) @ covariance @ np.array([1, -1]))


def test_patients_with_several_images_are_clusters():
    truth, ours, theirs = case(5, n=120)
    groups = np.random.default_rng(5).integers(0, 40, 120)
    found = compare(truth, ours, theirs, groups)
    assert found.error == pytest.approx(obuchowski(truth, ours, theirs, groups), abs=1e-12)
    thrice = [np.repeat(each, 3) for each in (truth, ours, theirs)]
    copied = compare(*thrice, np.repeat(np.arange(120), 3))
    alone = compare(truth, ours, theirs, np.arange(120))
    assert copied.p == pytest.approx(alone.p, rel=0.02)  # copies of an image say nothing new
    assert compare(*thrice, np.arange(360)).error < 0.6 * alone.error  # unless they are taken for independent ones


def test_differences_without_error_and_tests_that_do_not_exist():
    truth, ours, theirs = case(7)
    same = compare(truth, ours, 2 * ours, np.arange(len(truth)))
    assert (same.error, same.z, same.p) == (0, 0, 1)
    sure = compare(truth, truth, -truth, np.arange(len(truth)))
    assert (sure.ours, sure.theirs, sure.error, sure.z, sure.p) == (1, 0, 0, math.inf, 0)
    assert compare(truth, ours, theirs, np.zeros(len(truth), int)) is None
    assert compare(np.ones(9), np.arange(9.0), np.arange(9.0), np.arange(9)) is None
    assert compare(np.full(9, np.nan), np.arange(9.0), np.arange(9.0), np.arange(9)) is None
    two = np.array([1.0, 1, 0, 0])
    assert compare(two, np.array([3.0, 1, 2, 0]), np.array([1.0, 2, 3, 0]), np.arange(4)).ours == 0.75
    one = np.array([1.0, 0, 0, 0])
    for few in (one, 1 - one):
        assert compare(few, np.arange(4.0), np.arange(4.0), np.arange(4)) is None


def test_placements_are_shares_of_the_other_kind():
    positive, scores = np.array([True, False, True, False]), np.array([2.0, 2, 0, 1])
    up, down = placements(positive, scores)
    assert up.tolist() == [0.75, 0.0]
    assert down.tolist() == [0.25, 0.5]
