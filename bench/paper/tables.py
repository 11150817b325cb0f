"""Results as tables: the paper's Tables 1 and 4 to 9, and one table for each target; Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.paper.names import MAJORITY, METRICS, SEEDS, Cell, Layout, TableSpec, metric_label, target_name
from engine.transfer.fewshot import by_shots, in_words
from engine.transfer.results import Score

FIELDS = ("table", "target", "metric", "network", "source", "shots", "mean", "deviation", "seeds", "paper_mean",
          "paper_deviation")  # fmt: skip
NONE = "—"
MARKS = {"top1": "⁽¹⁾", "mean_auc": "⁽²⁾"}
OVER_SEEDS = f"Mean ± sample standard deviation over {SEEDS} seeds, or over as many as n says."
NO_CLAIM = "A difference within a standard deviation claims nothing."
PAPER_CAPTION = (
    f"⁽¹⁾ {METRICS['top1']}; ⁽²⁾ {METRICS['mean_auc']}. {OVER_SEEDS} **Bold**: the best of a row within a network; "
    f"★: the best of the row. {NO_CLAIM} [In brackets]: the paper's value. {NONE}: no result."
)
TARGET_CAPTION = f"{OVER_SEEDS} **Bold**: the best of a column. {NO_CLAIM} {NONE}: no result."


@dataclass(frozen=True)
class Entry:
    """What stands at one place of a table."""

    cell: Cell | None = None  # None: the table has nothing there
    score: Score | None = None
    paper: Score | None = None
    best: bool = False  # within its network, or its column
    top: bool = False  # of the whole row

    def __str__(self) -> str:
        shown = NONE if self.score is None else number(self.score)
        shown = f"**{shown}**" if self.best else shown
        return shown + (" ★" if self.top else "") + (f" [{number(self.paper)}]" if self.paper else "")


@dataclass(frozen=True)
class Table:
    """A table for people, with what a program wants to know of it."""

    name: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[Entry, ...]], ...]  # labels, entries
    notes: tuple[str, ...]

    def markdown(self) -> str:
        """Heading, table, notes."""
        lines = [f"## {self.title}", "", _line(self.head), _line("---" for _ in self.head)]
        lines += [_line([*labels, *map(str, entries)]) for labels, entries in self.rows]
        return "\n".join(lines) + "\n\n" + "\n\n".join(self.notes) + "\n"

    def csv(self) -> str:
        """A row for each entry, with columns FIELDS; mean and deviation in percent, unrounded."""
        text = io.StringIO()
        file = csv.writer(text, lineterminator="\n")
        file.writerow(FIELDS)
        for _, entries in self.rows:
            for entry in entries:
                if entry.cell and (entry.score or entry.paper):
                    ours, paper = _fields(entry.score), _fields(entry.paper)[:2]
                    cell = entry.cell
                    names = (self.name, cell.target, cell.metric, cell.network, cell.source, cell.shots)
                    file.writerow([*names, *ours, *paper])
        return text.getvalue()


def number(score: Score) -> str:
    """Two decimals, as the paper prints; n where it is not the paper's. What no run has is over no seeds."""
    text = f"{score.mean:.2f}" if score.deviation is None else f"{score.mean:.2f} ± {score.deviation:.2f}"
    return text if score.seeds in (0, SEEDS) else f"{text} (n={score.seeds})"


def paper_tables(
    scores: Mapping[Cell, Score], published: Mapping[tuple[str, Cell], Score], layout: Layout, whole: bool = False
) -> list[Table]:
    """The paper's tables, with those rows that have a result; `whole`: also those that have only the paper's."""
    tables = (_paper_table(spec, scores, published, layout, whole) for spec in layout.tables)
    return [table for table in tables if table.rows]


def _paper_table(
    spec: TableSpec,
    scores: Mapping[Cell, Score],
    published: Mapping[tuple[str, Cell], Score],
    layout: Layout,
    whole: bool,
) -> Table:
    rows = []
    for name, sources in spec.rows.items():
        target = layout.targets[name]
        metric = target.metric
        assert metric, f"{name} has a row in a table of the paper, and no metric"
        groups = []
        for network in layout.networks:
            wanted = [Cell(name, metric, source, network, "full") if source else None for source in sources]
            groups.append([_entry(spec.name, cell, scores, published, layout) for cell in wanted])
        entries = [entry for group in groups for entry in group]
        if any(entry.score for entry in entries) or (whole and any(entry.paper for entry in entries)):
            best = [entry for group in groups for entry in _mark(group, "best")]
            rows.append(((f"{target.label} {MARKS[metric]}",), tuple(_mark(best, "top"))))
    head = ("Target", *(f"{network}: {column}" for network in layout.networks.values() for column in spec.columns))
    notes = (PAPER_CAPTION, *_meanings(spec, layout), *_shares(spec, scores, layout))
    return Table(spec.name, spec.title, head, tuple(rows), notes)


def _shares(spec: TableSpec, scores: Mapping[Cell, Score], layout: Layout) -> list[str]:
    """A note on what accuracies are compared with, where it is known."""
    known = {name: scores.get(Cell(name, "top1", MAJORITY, "", "full")) for name in spec.rows}
    listed = [f"{layout.targets[name].label} {share.mean:.2f}" for name, share in known.items() if share]
    return [f"Top-1 of the {MAJORITY}, %: {', '.join(listed)}."] if listed else []


def _entry(
    table: str,
    cell: Cell | None,
    scores: Mapping[Cell, Score],
    published: Mapping[tuple[str, Cell], Score],
    layout: Layout,
) -> Entry:
    if cell is None:
        return Entry()
    taken = layout.preferred(cell, scores)
    return Entry(taken, scores.get(taken), published.get((table, cell)))


def _mark(entries: Sequence[Entry], mark: str) -> list[Entry]:
    """The entries, with the best of two or more scores marked; what prints the same is equally good."""
    means = [entry.score.mean for entry in entries if entry.score and not math.isnan(entry.score.mean)]
    best = f"{max(means):.2f}" if len(means) > 1 else None
    marked: dict[str, Any] = {mark: True}
    return [
        replace(entry, **marked) if entry.score and f"{entry.score.mean:.2f}" == best else entry for entry in entries
    ]


def _meanings(spec: TableSpec, layout: Layout) -> list[str]:
    """A note for each column that is another source for another target."""
    notes = []
    for index, column in enumerate(spec.columns):
        targets: dict[str, list[str]] = {}
        for name, sources in spec.rows.items():
            if source := sources[index]:
                targets.setdefault(source, []).append(layout.targets[name].label)
        if len(targets) > 1:
            listed = (f"{layout.source(name).label} for {', '.join(found)}" for name, found in targets.items())
            notes.append(f"{column}: {'; '.join(listed)}.")
    return notes


def target_tables(scores: Mapping[Cell, Score], layout: Layout) -> list[Table]:
    """A table for each target and metric: sources and networks down, shots across."""
    kinds = dict.fromkeys((cell.target, cell.metric) for cell in scores)
    return [_target_table(*kind, scores, layout) for kind in kinds]


def _target_table(name: str, metric: str, scores: Mapping[Cell, Score], layout: Layout) -> Table:
    found = [cell for cell in scores if (cell.target, cell.metric) == (name, metric)]
    shots = sorted({cell.shots for cell in found}, key=by_shots)
    settings = dict.fromkeys((cell.source, cell.network) for cell in sorted(found, key=layout.order))
    columns = []
    for number_of in shots:
        column = [Cell(name, metric, source, network, number_of) for source, network in settings]
        columns.append(_mark([Entry(cell, scores.get(cell)) for cell in column], "best"))
    labels = ((layout.source(source).label, network or NONE) for source, network in settings)
    target = layout.target(name)
    return Table(
        name=target_name(target, metric),
        title=f"{target.label}, {metric_label(metric)}",
        head=("Source", "Network", *map(in_words, shots)),
        rows=tuple(zip(labels, zip(*columns, strict=True), strict=True)),
        notes=(TARGET_CAPTION,),
    )


def _fields(score: Score | None) -> tuple:
    if score is None:
        return "", "", ""
    return score.mean, "" if score.deviation is None else score.deviation, score.seeds


def _line(words: Iterable[str]) -> str:
    return f"| {' | '.join(word.replace('|', '/') for word in words)} |"
