"""What takes the place of records that cannot be used."""

import numpy as np
import pytest

from loaders.errors import UserError
from loaders.pipelines.bad import BadRecords
from tests.loaders.pipelines.test_transform import pack_of
from tests.support.pictures import encoded, photo


@pytest.fixture
def pack(tmp_path):
    return pack_of(tmp_path / "a.h5", [(encoded(photo(i)), 40, 60) for i in range(6)])


def test_the_next_one_of_the_pool_takes_the_place_of_a_bad_one(pack):
    bad = BadRecords(pack, np.array([5, 1, 2, 4]), budget=3)
    assert [bad.other(record) for record in (0, 1, 2, 3, 4, 5)] == [1, 2, 4, 4, 5, 1]
    bad.report(4, "torn")
    assert bad.other(2) == 5
    ids, good = bad.replaced(np.array([4, 1, 4, 5]))
    assert (ids.tolist(), good.tolist()) == ([5, 1, 5, 5], [False, True, False, True])
    bad.report(5, "torn")
    bad.report(2, "torn")
    assert bad.other(1) is None
    assert bad.replaced(np.array([5]))[0].tolist() == [1]
    with pytest.raises(UserError, match="a.h5"):
        bad.report(1, "torn")
