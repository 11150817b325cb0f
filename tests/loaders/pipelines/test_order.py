import numpy as np
import pytest
from scipy import stats

from loaders.errors import UserError
from loaders.pipelines.order import DRAWS, LAST, Blocks, EvalPlan, TrainPlan, epoch_order, step_draws

WORLDS = (1, 2, 3, 4, 8)
SHUFFLES = [None, Blocks(size=7, window=3)]


def plan(n=131, batch=24, seed=3, **how):
    return TrainPlan(pool=np.arange(n), global_batch=batch, seed=seed, starts=(0, 50, 90), **how)


def whole(step, world, **how):
    """What all ranks together read in a step: ids (batch,), draws (batch, DRAWS)."""
    parts = [part for rank in range(world) for part in plan(rank=rank, world=world, **how).step(step)]
    return np.concatenate([p.ids for p in parts]), np.concatenate([p.draws for p in parts])


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("blocks", SHUFFLES)
def test_any_number_of_ranks_sees_the_same_global_batches(blocks, last):
    how = {"blocks": blocks, "last": last, "batch": 48}
    for step in (0, 1, 2, 3, 29):
        ids, draws = whole(step, 1, **how)
        for world in WORLDS:
            for accumulate in (1, 2):
                found = whole(step, world, accumulate=accumulate, **how)
                np.testing.assert_array_equal(found[0], ids)
                np.testing.assert_array_equal(found[1], draws)


@pytest.mark.parametrize("micro", [1, 4, 6])
def test_micro_batches_of_a_size_are_shared_by_any_number_of_ranks(micro):
    """Also by 5 or 7, which do not divide a batch of 24: then some take one more."""
    for step in (0, 5):
        ids, draws = whole(step, 1)
        for world in range(1, 24 // micro + 1):
            each = [plan(rank=rank, world=world, micro=micro).step(step) for rank in range(world)]
            assert {len(part.ids) for parts in each for part in parts} == {micro}
            assert max(map(len, each)) - min(map(len, each)) <= 1
            np.testing.assert_array_equal(np.concatenate([part.ids for parts in each for part in parts]), ids)
            np.testing.assert_array_equal(np.concatenate([part.draws for parts in each for part in parts]), draws)


@pytest.mark.parametrize("blocks", SHUFFLES)
@pytest.mark.parametrize("stop", [1, 4, 11, 17])
def test_a_run_goes_on_with_the_very_next_sample_on_another_number_of_ranks(blocks, stop):
    """Read straight through by one process, against: stopped anywhere, and continued by any number of others."""
    alone = plan(blocks=blocks)
    straight = np.concatenate([part.ids for step in range(20) for part in alone.step(step)])
    for before, after in zip(WORLDS, WORLDS[1:] + WORLDS[:1], strict=True):
        pieces = [whole(step, before if step < stop else after, blocks=blocks)[0] for step in range(20)]
        np.testing.assert_array_equal(np.concatenate(pieces), straight)


@pytest.mark.parametrize("blocks", SHUFFLES)
@pytest.mark.parametrize("last", LAST)
def test_what_happens_at_the_end_of_an_epoch(last, blocks):
    p = plan(last=last, blocks=blocks)  # 131 samples in batches of 24: 5 whole ones and 11 samples
    ids = np.concatenate([p.step(step)[0].ids for step in range(60)])
    if last == "wrap":  # epochs follow each other without a gap
        for epoch in range(10):
            assert sorted(ids[131 * epoch : 131 * (epoch + 1)]) == list(range(131))
        return
    steps = 5 if last == "drop" else 6
    seen = [ids[24 * steps * epoch : 24 * steps * (epoch + 1)] for epoch in range(10)]
    for epoch in seen:
        if last == "drop":
            assert len(set(epoch)) == len(epoch) == 120
        else:
            assert sorted(epoch[:131]) == list(range(131))
            np.testing.assert_array_equal(epoch[131:], epoch[:13])
    assert p.epoch_samples == 24 * steps
    assert len({tuple(epoch) for epoch in seen}) == 10
    if last == "drop":
        assert set(np.concatenate(seen)) == set(range(131))  # not the same ones every time


def test_a_pool_smaller_than_a_batch():
    ids = plan(n=5, batch=24).step(0)[0].ids
    assert np.bincount(ids, minlength=5).min() >= 4
    assert np.bincount(plan(n=5, last="fill").step(0)[0].ids, minlength=5).min() >= 4
    with pytest.raises(UserError, match="wrap"):
        plan(n=5, last="drop")


@pytest.mark.parametrize("blocks", [None, Blocks(size=16, window=8)])
def test_every_sample_comes_anywhere_in_an_epoch(blocks):
    """Each record's place is uniform over epochs, and no place prefers a record: chi-squared over 2,000 epochs."""
    n, bins = 640, 16
    orders = np.stack([epoch_order(n, 1, epoch, blocks, (0, 200, 333)) for epoch in range(2000)])
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.broadcast_to(np.arange(n), orders.shape))
    place = np.empty_like(orders)
    np.put_along_axis(place, orders, np.broadcast_to(np.arange(n), orders.shape), axis=1)
    for record in (0, 1, 17, 199, 200, 332, 333, 600, n - 1):
        counts = np.bincount(place[:, record] * bins // n, minlength=bins)
        assert stats.chisquare(counts).pvalue > 1e-4, record


def test_blocks_are_read_few_at_a_time():
    order = epoch_order(2000, 2, 0, Blocks(size=16, window=8))
    for at in range(0, 2000 - 128, 128):  # a window's worth touches two windows at most
        piece = np.sort(order[at : at + 128])
        assert np.count_nonzero(np.diff(piece) > 16) + 1 <= 16


def test_blocks_do_not_span_shards_and_are_cut_elsewhere_in_every_epoch():
    shard = np.repeat([0, 1, 2], (50, 40, 41))
    order = epoch_order(131, 2, 0, Blocks(size=1000, window=1), (0, 50, 90))
    assert np.count_nonzero(np.diff(shard[order])) <= 5  # three shards, each in two blocks at most, one by one
    cuts = []
    for epoch in range(2):
        place = np.argsort(epoch_order(2000, 2, epoch, Blocks(size=16, window=1)))
        cuts.append(set(np.flatnonzero(np.abs(np.diff(place)) >= 16)))
        assert len(cuts[-1]) > 100
    assert len(cuts[0] & cuts[1]) < 30


def test_the_blocks_mix_classes_as_promised():
    """Packs are sorted by class, the worst case. 64 classes of 256, batches of 128: classes per batch."""
    n, batch = 64 * 256, 128
    label = np.arange(n) // 256

    def per_batch(blocks):
        batches = label[epoch_order(n, 5, 0, blocks)].reshape(-1, batch)
        return np.mean([len(set(b)) for b in batches])

    uniform = per_batch(None)
    expected = 64 * (1 - (1 - 1 / 64) ** batch)  # drawing with replacement, close enough
    assert uniform == pytest.approx(expected, rel=0.02)
    # 256 blocks of 16, of 1,024 of 64 classes: as good as uniform within 6%; 4 blocks of 256: at most 8 classes.
    assert per_batch(Blocks(size=16, window=256)) > 0.94 * uniform
    assert 4 <= per_batch(Blocks(size=256, window=4)) <= 8


def test_pairs_meet_in_a_batch_as_often_as_in_a_uniform_shuffle_beyond_a_block():
    n, batch, epochs = 2048, 64, 400
    blocks = Blocks(size=8, window=64)  # 512 samples are shuffled together
    together = dict.fromkeys((1, 8, 64, 700), 0)
    for epoch in range(epochs):
        place = np.argsort(epoch_order(n, 9, epoch, blocks)) // batch
        for gap in together:
            together[gap] += np.mean(place[:-gap] == place[gap:])
    uniform = (batch - 1) / (n - 1)
    rate = {gap: count / epochs / uniform for gap, count in together.items()}
    for gap in (8, 64, 700):  # never in the same block
        assert rate[gap] == pytest.approx(1, abs=0.05)
    assert 1 < rate[1] < 4.2  # neighbours share a block, so a window: a quarter of the data


def test_draws_are_uniform_and_each_its_own():
    draws = np.concatenate([step_draws(1, step, 0, 500) for step in range(8)])
    assert draws.shape == (4000, DRAWS)
    assert stats.kstest(draws.ravel(), "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(draws.T) - np.eye(DRAWS)).max() < 0.08
    np.testing.assert_array_equal(step_draws(1, 3, 100, 50), step_draws(1, 3, 0, 500)[100:150])
    assert not np.array_equal(step_draws(2, 3, 0, 5), step_draws(1, 3, 0, 5))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("n", [1, 7, 64, 131])
def test_evaluation_counts_every_sample_once(n, world):
    pool = np.arange(n) * 3
    plans = [EvalPlan(pool, batch=5, rank=rank, world=world) for rank in range(world)]
    assert len({len(p) for p in plans}) == 1
    seen = []
    for p in plans:
        for number in range(len(p)):
            ids, valid = p.batch_ids(number)
            assert ids.shape == valid.shape == (5,)
            assert set(ids) <= set(pool)
            seen.extend(ids[valid].tolist())
    assert sorted(seen) == pool.tolist()


def test_the_order_stays_what_it_was():
    """A checkpoint of today must resume tomorrow: Philox keyed by SeedSequence((seed, 0, epoch)), raw words sorted."""
    bits = np.random.Philox(np.random.SeedSequence((3, 0, 2)))
    words = bits.random_raw(50).tolist()
    assert epoch_order(50, 3, 2).tolist() == sorted(range(50), key=lambda i: words[i])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"global_batch": 25, "world": 2}, "24 or 26"), ({"pool": []}, "empty"), ({"seed": -1}, "seed"),
     ({"micro": 3}, "1.33333 micro-batches of 3 for 1 ranks"), ({"micro": 2, "world": 3}, "2 micro-batches of 2 for 3"),
     ({"micro": 2, "accumulate": 2}, "Say one of both"), ({"rank": 2, "world": 2}, "rank 2"),
     ({"last": "skip"}, "wrap, drop, fill")],
)  # fmt: skip
def test_impossible_plans_are_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        TrainPlan(**{"pool": np.arange(9), "global_batch": 4, "seed": 0, **wrong})
    with pytest.raises(UserError, match="1 or more"):
        Blocks(0, 5)
