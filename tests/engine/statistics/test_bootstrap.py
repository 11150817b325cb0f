import numpy as np
import pytest

from engine.statistics import bootstrap


def test_a_resample_draws_as_many_groups_as_there_are():
    blocks = list(bootstrap.resamples(7, 150, 0))
    assert [block.shape for block in blocks] == [(7, 64), (7, 64), (7, 22)]
    times = np.concatenate(blocks, axis=1)
    assert times.dtype == np.float32 and (times.sum(0) == 7).all()
    assert len(np.unique(times, axis=1).T) > 100


def test_groups_are_drawn_equally_often():
    times = np.concatenate(list(bootstrap.resamples(5, 20_000, 1)), axis=1)
    assert times.mean(1) == pytest.approx(np.ones(5), abs=0.03)
    assert times.var(1) == pytest.approx(np.full(5, 0.8), abs=0.05)  # of binomial(5, 1/5)


def test_an_interval_is_of_those_that_have_a_value():
    values = np.append(np.arange(101.0), [np.nan] * 9)
    assert bootstrap.interval(values) == (2.5, 97.5, 101)
    low, high, count = bootstrap.interval(np.full(3, np.nan))
    assert np.isnan([low, high]).all() and count == 0


def test_what_fails_in_a_thread_is_raised_and_threads_are_as_before():
    import torch

    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        bootstrap.over_resamples(lambda block: 1 / 0, 3, 5, 0)
    assert torch.get_num_threads() == before


def test_progress_is_told_of_each_resample():
    told = []
    found = bootstrap.over_resamples(lambda block: block.shape[1], 3, 150, 0, told.append)
    assert found == told == [64, 64, 22]
