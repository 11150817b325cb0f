import numpy as np
import pytest

from engine.evaluating import case
from engine.predicting.table import Predictions, write
from loaders.errors import UserError

NAMES = ("a", "b", "c")


def classes(labels=(0, 1, 2, -1), groups=("x", "", "x", ""), names=NAMES, seed=0):
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(len(names)), len(labels))
    keys = [f"k{i}" for i in range(len(labels))]
    return Predictions(keys, list(groups), names, probabilities, np.array(labels), False)


def several(truth, groups=None, seed=0):
    truth = np.array(truth, float)
    probabilities = np.random.default_rng(seed).random(truth.shape)
    keys = [f"k{i}" for i in range(len(truth))]
    return Predictions(keys, groups or [""] * len(truth), NAMES[: truth.shape[1]], probabilities, truth, True)


def test_classes_become_vectors_and_unknown_ones_are_unknown():
    found = case.of(classes(), "x.csv").images
    assert found.truth[:3].tolist() == np.eye(3).tolist() and np.isnan(found.truth[3]).all()
    assert not found.many


def test_images_without_a_group_are_groups_of_their_own():
    found = case.of(classes(), "x.csv")
    assert found.images.groups.tolist() == [0, 1, 0, 2] and found.images.count == 3 and found.grouped
    alone = case.of(classes(groups=[""] * 4), "x.csv")
    assert alone.images.groups.tolist() == [0, 1, 2, 3] and not alone.grouped
    assert case.numbers(["7", "", "7", "2"]).tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize("labels", [None, np.full((4, 2), np.nan)])
def test_predictions_without_labels_cannot_be_scored(labels):
    found = several(np.zeros((4, 2)))
    with pytest.raises(UserError, match="x.csv holds no known label.*expected a column label"):
        case.of(Predictions(found.keys, found.groups, found.names, found.probabilities, labels, True), "x.csv")


def reordered(found, rows, columns):
    """The same images and labels in another order."""
    labels = found.labels[rows]
    labels = labels[:, columns] if found.many else np.array([-1 if x < 0 else columns.index(x) for x in labels])
    return Predictions(
        [found.keys[row] for row in rows], [found.groups[row] for row in rows],
        tuple(found.names[column] for column in columns), found.probabilities[rows][:, columns], labels, found.many,
    )  # fmt: skip


@pytest.mark.parametrize(
    "first", [classes(), several([[0, 1, np.nan], [1, 0, 0], [0, 0, 1], [1, 1, 1]], ["x", "", "x", "y"])]
)
def test_two_files_in_different_orders_come_into_one(first):
    like = case.of(first, "a.csv")
    found = case.arranged(reordered(first, [2, 0, 3, 1], [1, 2, 0]), "b.csv", like)
    assert np.array_equal(found.images.probabilities, first.probabilities)
    assert np.array_equal(found.images.truth, like.images.truth, equal_nan=True)
    assert found.title == "b.csv" and found.names == first.names


def test_what_cannot_be_compared_is_told():
    first = classes()
    like = case.of(first, "a.csv")

    def refused(**changes):
        fields = {name: getattr(first, name) for name in ("keys", "groups", "names", "probabilities", "labels", "many")}
        with pytest.raises(UserError) as error:
            case.arranged(Predictions(**fields | changes), "b.csv", like)
        return str(error.value)

    assert "b.csv lacks images that a.csv has: k3" in refused(keys=["k0", "k1", "k2", "z"])
    more = {"keys": [*first.keys, "z"], "groups": [*first.groups, ""], "labels": np.append(first.labels, 0)}
    more["probabilities"] = np.concatenate([first.probabilities, first.probabilities[:1]])
    assert "a.csv lacks images that b.csv has: z" in refused(**more)
    assert "the classes a, b, c, b.csv the classes a, b, d" in refused(names=("a", "b", "d"))
    assert "b.csv the labels a, b, c" in refused(many=True, labels=None)
    assert "other labels for k0, k3" in refused(labels=np.array([1, 1, 2, 0]))
    assert "other groups for k2" in refused(groups=["x", "q", "y", ""])
    without = Predictions(first.keys, [""] * 4, NAMES, first.probabilities, None, False)
    assert case.arranged(without, "b.csv", like).images.groups.tolist() == like.images.groups.tolist()


def test_what_is_chosen_on_the_images_that_are_scored_is_refused(tmp_path):
    first = classes()
    like = case.of(first, "a.csv")
    write(tmp_path / "other.csv", classes(seed=1), {})  # same names of images, other images
    found = case.load_other(tmp_path / "other.csv", like, "--calibrate")
    assert np.array_equal(found.images.probabilities, classes(seed=1).probabilities)
    write(tmp_path / "turned.csv", reordered(classes(seed=1), [0, 1, 2, 3], [2, 0, 1]), {})
    turned = case.load_other(tmp_path / "turned.csv", like, "--calibrate")
    assert np.array_equal(turned.images.probabilities, found.images.probabilities)
    assert np.array_equal(turned.images.truth, found.images.truth, equal_nan=True)
    write(tmp_path / "same.csv", reordered(first, [3, 1], [0, 1, 2]), {})
    with pytest.raises(UserError, match="--calibrate .*same.csv: 2 of its images are scored too, in a.csv, such as k"):
        case.load_other(tmp_path / "same.csv", like, "--calibrate")
