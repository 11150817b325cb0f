import numpy as np
import pytest

from engine.transfer.fewshot import by_shots, draw, in_words, oversample, short_classes
from loaders.errors import UserError


@pytest.fixture
def labels():
    return np.random.RandomState(3).randint(0, 7, 500)


@pytest.mark.parametrize("shots", [1, 5, 30])
def test_as_many_of_each_class(labels, shots):
    ids = draw(labels, shots, seed=0)
    assert ids.dtype == np.int64
    assert (np.diff(ids) > 0).all()
    assert (np.bincount(labels[ids]) == shots).all()


def test_seeds_differ_and_repeat(labels):
    assert np.array_equal(draw(labels, 5, 1), draw(labels.copy(), 5, 1))
    assert not np.array_equal(draw(labels, 5, 1), draw(labels, 5, 2))


def test_the_same_on_any_machine():
    # RandomState's stream is frozen (NEP 19); these ids were drawn once, with NumPy 2.4 on x86-64.
    assert draw(np.arange(40) % 2, 3, seed=42).tolist() == [0, 16, 25, 27, 28, 33]


def test_small_draws_are_part_of_large_ones(labels):
    assert set(draw(labels, 1, 9)) < set(draw(labels, 5, 9)) < set(draw(labels, 10, 9)) < set(draw(labels, "full", 9))


def test_one_class_does_not_move_another(labels):
    ids = draw(labels, 5, 4)
    without = np.where(labels == 2, 6, labels)
    kept = draw(without, 5, 4)
    assert set(ids[labels[ids] == 3]) == set(kept[without[kept] == 3])


def test_every_sample_is_as_likely():
    labels = np.zeros(20, dtype=np.int64)
    times = sum(np.bincount(draw(labels, 5, seed), minlength=20) for seed in range(2000))
    # 2,000 draws with probability 1/4: mean 500, deviation 19.4; five deviations.
    assert np.abs(times - 500).max() < 97


def test_full_takes_multi_label_sets():
    assert draw(np.full((6, 3), np.nan), "full", 0).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_share_is_of_each_class_and_part_of_a_larger_one(labels):
    counts = np.bincount(labels)
    small, large = (draw(labels, share, seed=2) for share in ("7.5%", "20%"))
    assert set(small) < set(large)
    assert set(draw(labels, 5, 2)) < set(large)
    assert np.bincount(labels[small]).tolist() == [round(0.075 * n) for n in counts]
    assert np.bincount(labels[large]).tolist() == [round(0.2 * n) for n in counts]
    assert (np.bincount(labels[draw(labels, "0.1%", 0)]) == 1).all()
    assert np.array_equal(draw(labels, "100%", 5), np.arange(500))
    assert short_classes(labels, "10%", num_classes=9) == {}


def test_a_share_of_label_vectors():
    labels = np.full((200, 3), np.nan)
    first, second = (draw(labels, "25%", seed) for seed in (0, 1))
    assert len(first) == len(set(first)) == 50
    assert set(first) < set(draw(labels, "50%", 0))
    assert not np.array_equal(first, second)


def test_shots_in_order_and_in_words():
    assert sorted(["full", "10%", "100", "5%", "1"], key=by_shots) == ["1", "100", "5%", "10%", "full"]
    assert [in_words(shots) for shots in ("1", "10%", "full")] == ["1 shot", "10%", "full"]


def test_short_classes_give_what_they_have():
    labels = np.array([0, 0, 0, 1, 3, 3])
    assert draw(labels, 2, 0)[-3:].tolist() == [3, 4, 5]
    assert short_classes(labels, 2, num_classes=4) == {1: 1, 2: 0}
    assert short_classes(labels, "full", num_classes=4) == {}


def test_oversampling_evens_out(labels):
    rare = np.flatnonzero((labels != 5) | (np.arange(500) < 30))
    ids = oversample(labels, rare, seed=1)
    before, after = np.bincount(labels[rare]), np.bincount(labels[ids])
    assert (after == before.max()).all()
    assert set(ids) == set(rare)
    times = np.bincount(ids)[rare]
    for c in range(7):
        own = times[labels[rare] == c]
        assert own.max() - own.min() <= 1


@pytest.mark.parametrize("shots", [0, -1, "five", 2.5, True, "", "0%", "101%", "%", "-5%", "1e1%", "٣%"])
def test_bad_shots(labels, shots):
    with pytest.raises(UserError, match="shots is"):
        draw(labels, shots, 0)


def test_bad_labels():
    with pytest.raises(UserError, match="shots=full"):
        draw(np.zeros((4, 2), dtype=np.float32), 1, 0)
    with pytest.raises(UserError, match="empty"):
        draw(np.zeros(0, dtype=np.int64), 1, 0)
    with pytest.raises(UserError, match="-1"):
        draw(np.array([0, -1]), 1, 0)
