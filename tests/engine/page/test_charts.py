import math

import numpy as np
import pytest

from engine.page.charts import Chart, Series, thinned


@pytest.mark.parametrize("many", [1, 2, 399, 400, 401, 5000])
def test_a_thinned_line_keeps_its_ends_and_extremes(many):
    random = np.random.default_rng(many)
    points = list(zip(range(many), random.normal(size=many).tolist(), strict=True))
    found = thinned(points)
    assert len(found) <= 400
    assert set(found) <= set(points)
    assert found == sorted(found)
    assert (found[0], found[-1]) == (points[0], points[-1])
    for extreme in (min, max):
        assert extreme(y for _, y in found) == extreme(y for _, y in points)
    if many <= 400:
        assert found == points


def test_a_peak_between_points_of_a_long_line_is_seen():
    points = [(float(x), 0.0) for x in range(100_000)]
    points[54_321] = (54_321.0, 7.0)
    assert (54_321.0, 7.0) in thinned(points)


def test_what_is_not_finite_is_no_point():
    chart = Chart("t", "x", "y", [Series("a", 0, [(0, 1.0), (1, math.nan), (2, math.inf), (3, 1 / 3)])])
    assert chart.as_json()["series"][0]["points"] == [[0.0, 1.0], [3.0, 0.333333]]
