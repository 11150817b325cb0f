"""What a page draws: lines over a common axis, with few enough points for a file that is mailed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOST_POINTS = 400
"""Of a line. More are not seen on a page of 1,280 pixels."""


@dataclass(frozen=True)
class Series:
    """A line: `look` is its number among the looks of the page, one for each run, the same in all charts."""

    name: str
    look: int
    points: Sequence[tuple[float, float]]  # sorted by x
    marked: bool = False  # a dot at each point: measured there only


@dataclass(frozen=True)
class Chart:
    """Lines with one axis each way. Charts of the same `x` are zoomed together."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    logarithmic: bool = False  # of x

    def as_json(self) -> dict[str, Any]:
        """For the script of the page."""
        return {
            "title": self.title, "x": self.x, "y": self.y, "log": self.logarithmic,
            "series": [{"name": one.name, "look": one.look, "marked": one.marked,
                        "points": [[_short(x), _short(y)] for x, y in thinned(one.points)]} for one in self.series],
        }  # fmt: skip

    def in_words(self) -> str:
        """What it shows, for those who do not see it."""
        ends = [f"{one.name} ends at {_said(one.points[-1][1])}" for one in self.series if one.points]
        return f"{self.title}: {self.y} over {self.x}. {'; '.join(ends)}."


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points (4 or more) of a line, its first, last, lowest and highest among them: of each stretch of
    it the lowest and the highest. What is not finite is left out."""
    finite = [point for point in points if all(map(math.isfinite, point))]
    if len(finite) <= most:
        return finite
    stretches = (most - 2) // 2
    inner, kept = finite[1:-1], [finite[0]]
    for number in range(stretches):
        lo, hi = (len(inner) * k // stretches for k in (number, number + 1))
        extremes = {min(range(lo, hi), key=lambda k: inner[k][1]), max(range(lo, hi), key=lambda k: inner[k][1])}
        kept += [inner[k] for k in sorted(extremes)]
    return [*kept, finite[-1]]


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _said(value: float) -> str:
    return f"{value:.4g}"
