"""MATLAB's files, against SciPy's writer and reader."""

import io

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from loaders.sources.wire.mat import arrays


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "i8", "f4", "f8"])
def test_arrays_are_read_as_scipy_reads_them(compressed, dtype):
    out = io.BytesIO()
    random = np.random.default_rng(1)
    content = {
        "labels": random.integers(0, 103, (1, 8189)).astype(dtype),
        "a": np.array([[3]], dtype),
        "sides": random.integers(0, 9, (3, 4)).astype(dtype),
        "none": np.zeros((1, 0), dtype),
    }
    savemat(out, content | {"text": "abc", "cell": np.array([[1, "x"]], object)}, do_compression=compressed)
    expected, found = loadmat(io.BytesIO(out.getvalue())), arrays(out.getvalue())
    assert found.keys() == content.keys()
    for name in content:
        np.testing.assert_array_equal(found[name], expected[name])


def test_what_is_no_such_file_or_unpacks_to_too_much_is_refused():
    with pytest.raises(ValueError, match="does not begin"):
        arrays(b"MATLAB 7.3 MAT-file".ljust(600))
    out = io.BytesIO()
    savemat(out, {"labels": np.zeros((1, 10**7))}, do_compression=True)
    assert len(out.getvalue()) < 1 << 18
    with pytest.raises(ValueError, match="goes on after the end"):
        arrays(out.getvalue())
