"""The results of a target as a table: a row for each source of the weights, a column for each number of shots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.transfer.fewshot import by_shots
from engine.transfer.results import Result, Score, majority, score

METRICS = {"top1": "top-1, %", "mean_auc": "mean AUC, %"}
MAJORITY = "majority class"
"""What the share of the test set's most frequent class is called, beside top-1."""


@dataclass(frozen=True)
class Table:
    """The scores of one target."""

    dataset: str
    metric: str
    scores: Mapping[str, Mapping[str, Score]]  # source of the weights → shots → score
    majority: float | None = None  # percent

    @property
    def shots(self) -> list[str]:
        """Fewest first, full last."""
        return sorted({shots for found in self.scores.values() for shots in found}, key=by_shots)

    @property
    def unit(self) -> str:
        """The metric, for people."""
        return METRICS.get(self.metric, self.metric)

    @property
    def points(self) -> int:
        """How many scores there are."""
        return sum(map(len, self.scores.values()))


def scores(results: Sequence[Result]) -> dict[str, dict[str, Score]]:
    """Source of the weights (and network, where a source has several) → shots → score, of one target's results."""
    networks: dict[str, set[str | None]] = {}
    for result in results:
        networks.setdefault(result.source, set()).add(result.network)
    values: dict[str, dict[str, list[float]]] = {}
    for result in results:
        source = result.source if len(networks[result.source]) == 1 else f"{result.source} ({result.network})"
        values.setdefault(source, {}).setdefault(result.shots, []).append(result.value)
    return {source: {shots: score(found) for shots, found in by_number.items()} for source, by_number in values.items()}


def tables(results: Sequence[Result]) -> list[tuple[Table, list[Result]]]:
    """The table of each target and metric, with the results that it is of."""
    by_target: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        by_target.setdefault((result.dataset, result.metric), []).append(result)
    return [(Table(*target, scores(own), majority(own)), own) for target, own in by_target.items()]


def label(source: str) -> str:
    """A source of weights, for people."""
    name, _, network = source.partition(" ")
    return f"random weights {network}".strip() if name == "random" else f"pre-trained: {source}"
