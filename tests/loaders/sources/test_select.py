"""The two sides of a split that anyone can draw again."""

import numpy as np
import pytest

from loaders.sources import select


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_share_of_each_class_by_whole_groups(share):
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], [400, 100])
    groups = np.where(np.arange(500) % 2 == 0, -1, random.integers(0, 60, 500))
    keys = np.array([b"%d" % i for i in range(500)], object)
    groups[labels == 1] += (groups[labels == 1] != -1) * 100  # no group is of two classes
    in_test = select.held_out(keys, labels, groups, share)
    for label in (0, 1):
        assert abs(in_test[labels == label].mean() - share) < 0.05
    for group in np.unique(groups[groups != -1]):
        assert len(np.unique(in_test[groups == group])) == 1
    again = random.permutation(500)
    np.testing.assert_array_equal(select.held_out(keys[again], labels[again], groups[again], share), in_test[again])
