import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, brier_score_loss, recall_score, roc_auc_score

from engine.statistics import bootstrap
from engine.statistics.scores import BINS, METRICS, Images, largest_share, of_all, of_resamples, of_weights, row_names


def several(seed=0, n=300, k=4, groups=80, unknown=0.2):
    """Several labels at once: ties, unknown ones, patients with many images, patients without any."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((n, k)) < 0.3).astype(float)
    probabilities = np.round((0.4 * truth + 0.6 * rng.random((n, k))), 2)
    truth[rng.random((n, k)) < unknown] = np.nan
    said = (probabilities >= 0.4).astype(float)
    return Images(truth, probabilities, rng.integers(0, groups, n) ** 2 // groups, groups, True, said)


def one_of_many(seed=0, n=300, k=3, groups=300):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, k, n)
    probabilities = rng.dirichlet(np.ones(k), n) + 0.3 * np.eye(k)[label]
    probabilities /= probabilities.sum(1, keepdims=True)
    truth = np.eye(k)[label]
    truth[rng.random(n) < 0.1] = np.nan
    said = np.eye(k)[probabilities.argmax(1)]
    return Images(truth, probabilities, rng.permutation(n) % groups, groups, False, said)


def calibration_error(truth, probabilities, weight):
    """By its definition, bin after bin."""
    total = 0.0
    for i in range(BINS):
        inside = (probabilities >= i / BINS) & ((probabilities < (i + 1) / BINS) | (i == BINS - 1))
        if weight[inside].sum():
            observed = np.average(truth[inside], weights=weight[inside])
            total += weight[inside].sum() * abs(observed - np.average(probabilities[inside], weights=weight[inside]))
    return total / weight.sum()


def expected(images, weights):
    """Metric → labels, of one weighting of the groups, by scikit-learn."""
    found = {name: [] for name in METRICS}
    for k in range(images.truth.shape[1]):
        known = ~np.isnan(images.truth[:, k])
        truth, score, said = images.truth[known, k], images.probabilities[known, k], images.said[known, k]
        weight = weights[images.groups[known]]
        found["auc"].append(roc_auc_score(truth, score, sample_weight=weight))
        found["average_precision"].append(average_precision_score(truth, score, sample_weight=weight))
        found["sensitivity"].append(recall_score(truth, said, sample_weight=weight))
        found["specificity"].append(recall_score(truth, said, sample_weight=weight, pos_label=0))
        found["accuracy"].append(accuracy_score(truth, said, sample_weight=weight))
        found["brier"].append(brier_score_loss(truth, score, sample_weight=weight))
        found["ece"].append(calibration_error(truth, score, weight))
    return found


@pytest.mark.parametrize("images", [several(), several(1, unknown=0), several(2, n=2000, groups=2000), one_of_many()])
def test_scores_are_scikit_learns_with_and_without_weights(images):
    weights = np.random.default_rng(3).multinomial(images.count, np.full(images.count, 1 / images.count), 6).T
    found, whole = of_weights(images, weights), of_all(images)
    labels = images.truth.shape[1]
    for column, values in enumerate([*weights.T, np.ones(images.count)]):
        for name, each in expected(images, values).items():
            if name == "accuracy" and not images.many:
                continue
            mine = whole[name][:, 0] if column == weights.shape[1] else found[name][:, column]
            assert mine[:labels] == pytest.approx(each, abs=1e-12), name
            assert mine[labels] == pytest.approx(np.mean(each), abs=1e-12), name


def test_all_classes_together_are_scikit_learns():
    images = one_of_many()
    weights = np.random.default_rng(3).integers(0, 4, (images.count, 5))
    found = of_weights(images, weights)
    assert row_names("abc", False) == ["a", "b", "c", "mean", "all classes"]
    known = ~np.isnan(images.truth[:, 0])
    label, probabilities = images.truth[known].argmax(1), images.probabilities[known]
    for column, each in enumerate(weights.T):
        weight = each[images.groups[known]]
        best = probabilities.argmax(1)
        accuracy = accuracy_score(label, best, sample_weight=weight)
        assert found["accuracy"][-1, column] == pytest.approx(accuracy, abs=1e-12)
        brier = brier_score_loss(label, probabilities, sample_weight=weight, labels=[0, 1, 2], scale_by_half=False)
        assert found["brier"][-1, column] == pytest.approx(brier, abs=1e-12)
        error = calibration_error((best == label).astype(float), probabilities.max(1), weight)
        assert found["ece"][-1, column] == pytest.approx(error, abs=1e-12)
        assert np.isnan(found["auc"][-1, column]) and np.isnan(found["accuracy"][:-1]).all()


def test_more_labels_than_are_worked_on_at_once_are_scored_likewise():
    images = several(n=60, k=70, groups=60, unknown=0)
    whole = of_all(images)
    for k in (0, 31, 32, 69):
        area = roc_auc_score(images.truth[:, k], images.probabilities[:, k])
        assert whole["auc"][k, 0] == pytest.approx(area, abs=1e-12)


def test_a_label_with_one_value_has_no_areas_and_is_not_in_their_mean():
    images = several(unknown=0)
    images.truth[:, 0] = 1
    images.truth[:, 1] = 0
    images.truth[:, 2] = np.nan
    found = of_all(images)
    for name in ("auc", "average_precision"):
        assert np.isnan(found[name][:3]).all()
        assert found[name][4, 0] == found[name][3, 0]
    assert np.isnan(found["specificity"][0, 0]) and not np.isnan(found["sensitivity"][0, 0])
    assert np.isnan(found["sensitivity"][1, 0]) and not np.isnan(found["brier"][1, 0])
    assert np.isnan(found["brier"][2, 0])


def test_what_was_not_said_has_no_sensitivity():
    images = several()
    assert np.isnan(of_all(Images(images.truth, images.probabilities, images.groups, 80, True))["sensitivity"]).all()
    images.said[:, 1] = np.nan
    found = of_all(images)
    assert np.isnan(found["sensitivity"][1, 0]) and np.isnan(found["accuracy"][1, 0])
    assert not np.isnan(found["sensitivity"][[0, 2, 3, 4], 0]).any()


def test_the_largest_share_is_that_of_always_saying_the_same():
    images = several()
    positive = np.nanmean(images.truth, 0)
    assert largest_share(images)[:-1] == pytest.approx(np.maximum(positive, 1 - positive))
    classes = one_of_many()
    counts = np.nansum(classes.truth, 0)
    assert largest_share(classes)[-1] == pytest.approx(counts.max() / counts.sum())
    assert np.isnan(largest_share(classes)[:-1]).all()


def test_resamples_are_those_of_drawing_patients_by_hand():
    """Spread and middle of the replicates, against taking rows again and again."""
    images = several(n=400, k=1, groups=40)
    found = of_resamples(images, 2000, 0)["auc"][0]
    rng = np.random.default_rng(9)
    rows_of = [np.flatnonzero(images.groups == group) for group in range(images.count)]
    by_hand = []
    for _ in range(2000):
        rows = np.concatenate([rows_of[group] for group in rng.integers(0, 40, 40)])
        known = ~np.isnan(images.truth[rows, 0])
        by_hand.append(roc_auc_score(images.truth[rows[known], 0], images.probabilities[rows[known], 0]))
    assert np.std(found) == pytest.approx(np.std(by_hand), rel=0.1)
    assert np.quantile(found, (0.025, 0.5, 0.975)) == pytest.approx(np.quantile(by_hand, (0.025, 0.5, 0.975)), abs=0.01)


def test_equal_seeds_draw_the_same_however_many_threads_and_parts():
    import torch

    images = several()
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(of_resamples(images, 150, 4))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    for name in METRICS:
        assert np.array_equal(found[0][name], found[1][name], equal_nan=True)
    assert not np.array_equal(found[0]["auc"], of_resamples(images, 150, 5)["auc"])
    half = images.part(np.arange(len(images.groups)) % 2 == 0)
    part = of_resamples(half, 150, 4)
    blocks = np.concatenate(list(bootstrap.resamples(images.count, 150, 4)), axis=1)
    assert part["brier"] == pytest.approx(of_weights(half, blocks)["brier"], abs=1e-15)
