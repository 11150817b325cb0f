"""What targets and sources of results are called, and where the paper's tables and figures have them.

bench/paper/published/layout.yaml says the latter; bench/paper/published/tables.csv has the paper's values.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from engine.transfer.results import OF_A_CLASS, Result, Score, majority, network_of, score
from loaders.errors import UserError

PUBLISHED = Path(__file__).parent / "published"
SEEDS = 5
"""Of each of the paper's cells."""
METRICS = {"top1": "top-1 accuracy, %", "mean_auc": "mean ROC AUC, %", "mean_ap": "mean average precision, %"}
_CLASS_METRICS = {
    "average_precision_class": "average precision",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
}


MAJORITY = "majority class"
"""A source of its own: who always says the test set's most frequent class, which accuracies are compared with."""


@dataclass(frozen=True)
class Target:
    """What is transferred to."""

    name: str
    label: str  # for people
    metric: str | None = None  # the paper's; None: the paper has no such target
    domain: str | None = None  # natural or medical


@dataclass(frozen=True)
class Source:
    """What the weights come from, without the network."""

    name: str
    label: str
    domain: str | None = None  # natural or medical; None: neither, as far as we know
    images: int | None = None
    prefer: str | None = None  # what a table takes instead, where there are results of it


@dataclass(frozen=True)
class Cell:
    """One setting, by canonical names."""

    target: str
    metric: str
    source: str
    network: str  # "" where unknown
    shots: str  # "10" or "full"


@dataclass(frozen=True)
class TableSpec:
    """A table of the paper: a source for each target and column, for each of the paper's networks."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[str | None, ...]]


@dataclass(frozen=True)
class Panel:
    """A panel of a figure."""

    kind: str  # shots, full, scale
    target: str
    sources: tuple[str, ...]  # domains, or columns of Table 1


@dataclass(frozen=True)
class FigureSpec:
    """A figure of the paper."""

    name: str
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Layout:
    """The paper's names, tables and figures."""

    networks: Mapping[str, str]  # R50x1 → ResNet-50x1
    targets: Mapping[str, Target]
    aliases: Mapping[str, str]  # other names of targets
    natural: Mapping[str, Source]
    sets: Mapping[str, tuple[str, int]]  # X-ray sets: label, images
    tables: tuple[TableSpec, ...]
    figures: tuple[FigureSpec, ...]

    def target(self, name: str) -> Target:
        """The target of a pack's name: `cifar10-train` is CIFAR-10. One that the paper lacks keeps its name."""
        short = name.removesuffix("-train").removesuffix("_train")
        plain = short.lower().replace("-", "_")
        return self.targets.get(self.aliases.get(plain, plain)) or Target(short, short)

    def source(self, name: str, network: str | None = None) -> Source:
        """The source of the weights, without its network's name and in whichever order a superset's parts come."""
        stem = name.rsplit("_", 1)[0] if network and network_of(name) == network else name
        if stem in self.natural:
            return self.natural[stem]
        parts = sorted(set(stem.split("_")))
        if all(part in self.sets for part in parts):
            label = "+".join(self.sets[part][0] for part in parts)
            return Source("_".join(parts), label, "medical", sum(self.sets[part][1] for part in parts))
        return Source(stem, "random weights" if stem == "random" else stem)

    def column(self, target: str, column: str) -> str | None:
        """The source that a column of Table 1 means for a target."""
        table = self.tables[0]
        return table.rows[target][table.columns.index(column)]

    def preferred(self, cell: Cell, scores: Container[Cell]) -> Cell:
        """The cell that the paper's tables take for this one, of those that have a score."""
        other = replace(cell, source=self.source(cell.source).prefer or cell.source)
        return other if other in scores else cell

    def order(self, cell: Cell) -> tuple:
        """By which cells are sorted: natural sources, medical ones by images, others by name; small networks first."""
        source = self.source(cell.source)
        domains = ("natural", "medical", None)
        networks = list(self.networks)
        at = networks.index(cell.network) if cell.network in networks else len(networks)
        last = cell.source == MAJORITY
        return last, domains.index(source.domain), source.images or 0, source.name, at, cell.network


def read_layout() -> Layout:
    """The layout of the paper."""
    content = yaml.safe_load((PUBLISHED / "layout.yaml").read_text(encoding="utf-8"))
    targets = content["targets"]
    return Layout(
        networks=content["networks"],
        targets={
            name: Target(name, facts["label"], facts["metric"], facts["domain"]) for name, facts in targets.items()
        },
        aliases={other: name for name, facts in targets.items() for other in facts.get("names", ())},
        natural={name: Source(name, **facts) for name, facts in content["sources"].items()},
        sets={name: (facts["label"], facts["images"]) for name, facts in content["sets"].items()},
        tables=tuple(
            TableSpec(
                name, spec["title"], tuple(spec["columns"]), {row: tuple(found) for row, found in spec["rows"].items()}
            )
            for name, spec in content["tables"].items()
        ),
        figures=tuple(
            FigureSpec(
                name,
                spec["title"],
                tuple(Panel(panel["kind"], panel["target"], tuple(panel["from"])) for panel in spec["panels"]),
            )
            for name, spec in content["figures"].items()
        ),
    )


def read_published() -> dict[tuple[str, Cell], Score]:
    """(table's name, cell) → the paper's score."""
    with open(PUBLISHED / "tables.csv", encoding="utf-8") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {
            (row["table"], Cell(row["target"], row["metric"], row["source"], row["network"], "full")): Score(
                float(row["mean"]), float(row["deviation"]), SEEDS
            )
            for row in rows
        }


def cells(results: Iterable[Result], layout: Layout) -> dict[Cell, Score]:
    """The score of each setting over its seeds, sorted for people.

    Where results say the share of the test set's most frequent class, it is the score of the source `MAJORITY` at each
    number of shots, over no seeds. UserError where runs of two names fall into one setting: they are not seeds of the
    same experiment.
    """
    results = list(results)
    values: dict[Cell, list[float]] = {}
    origins: dict[Cell, tuple[str, str]] = {}
    for result in results:
        target, source = layout.target(result.dataset), layout.source(result.source, result.network)
        cell = Cell(target.name, result.metric, source.name, result.network or "", result.shots)
        origin = (result.source, result.dataset)
        if origins.setdefault(cell, origin) != origin:
            one, other = (" on ".join(names) for names in (origins[cell], origin))
            raise UserError(
                f"{one} and {other} are the same setting ({source.label}, {cell.network or 'network unknown'}, "
                f"{target.label}): their runs do not make one mean. Give the results of one of them"
            )
        values.setdefault(cell, []).append(result.value)
    scores = {cell: score(found) for cell, found in values.items()} | _majorities(results, layout)
    names = [*layout.targets]

    def place(cell: Cell) -> tuple[int, bool]:
        """As in Table 1, others after these; the paper's metric before another."""
        at = names.index(cell.target) if cell.target in names else len(names)
        return at, cell.metric != layout.target(cell.target).metric

    return {cell: scores[cell] for cell in sorted(scores, key=place)}


def _majorities(results: Iterable[Result], layout: Layout) -> dict[Cell, Score]:
    by_target: dict[str, list[Result]] = {}
    for result in results:
        if result.metric == "top1":
            by_target.setdefault(layout.target(result.dataset).name, []).append(result)
    shares = {target: majority(found) for target, found in by_target.items()}
    return {
        Cell(target, "top1", MAJORITY, "", result.shots): Score(share, None, 0)
        for target, share in shares.items()
        if share is not None
        for result in by_target[target]
    }


def metric_label(metric: str) -> str:
    """A metric for people, with its unit; one that is not known keeps its name."""
    if found := OF_A_CLASS.match(metric):
        return f"{_CLASS_METRICS[found[1]]} of class {found[2]}, %"
    return METRICS.get(metric, metric)


def target_name(target: Target, metric: str) -> str:
    """What a target's own table or figure is called; also where it has more metrics than one."""
    plain = re.sub(r"[^\w.-]+", "_", target.name)
    return f"target_{plain}" if metric == (target.metric or metric) else f"target_{plain}_{metric}"
