"""Results as figures: the paper's Figures 1, 2 and 4 to 8, and one for each target that has more than these show."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.report_names import METRICS, Cell, FigureSpec, Layout, Panel, target_name
from bench.report_panels import Style, draw_full, draw_scale, draw_shots
from engine.results import Score

WIDTH, HEIGHT, LEGEND = 4.3, 3.5, 2.4
"""Of a panel, and of the legend beside all of them, inches."""


@dataclass(frozen=True)
class Content:
    """A panel and what is in it."""

    kind: str
    target: str
    scores: Mapping[Cell, Score]
    columns: Mapping[str, str]  # scale: source → column of Table 1


def figures(scores: Mapping[Cell, Score], layout: Layout) -> dict[str, Figure]:
    """Name → figure, of those that have anything to show."""
    drawn, shown = {}, set()
    for spec in layout.figures:
        contents = [content(panel, scores, layout) for panel in spec.panels]
        if contents := [one for one in contents if one.scores]:
            drawn[spec.name] = draw(spec.title, contents, layout)
            shown |= {cell for one in contents for cell in one.scores}
    for target, metric in dict.fromkeys((cell.target, cell.metric) for cell in scores if cell not in shown):
        found = {cell: score for cell, score in scores.items() if (cell.target, cell.metric) == (target, metric)}
        label = layout.target(target).label
        title = f"{label}: {METRICS.get(metric, metric).removesuffix(', %')} over shots and sources"
        drawn[target_name(layout.target(target), metric)] = draw(title, generic(found, layout), layout)
    return drawn


def content(panel: Panel, scores: Mapping[Cell, Score], layout: Layout) -> Content:
    """What results there are for a panel of the paper."""
    target = layout.targets[panel.target]
    columns = {layout.column(target.name, name): name for name in panel.sources if name in layout.tables[0].columns}
    wanted = {
        cell
        for cell in scores
        if (cell.target, cell.metric) == (target.name, target.metric)
        and (cell.source in columns or layout.source(cell.source).domain in panel.sources)
        and (panel.kind == "shots" or cell.shots == "full")
    }
    return Content(panel.kind, target.name, _sorted(scores, wanted, layout), columns)


def generic(scores: Mapping[Cell, Score], layout: Layout) -> list[Content]:
    """Panels for whatever there is of one target: curves where there are few shots, bars where there is full shot."""
    target = next(iter(scores)).target
    full = {cell for cell in scores if cell.shots == "full"}
    kinds = (("shots", set(scores) if full != set(scores) else set()), ("full", full))
    return [Content(kind, target, _sorted(scores, cells, layout), {}) for kind, cells in kinds if cells]


def draw(title: str, contents: Sequence[Content], layout: Layout) -> Figure:
    """A figure with a panel for each content, and one legend beside them."""
    style = Style.of((cell for one in contents for cell in one.scores), layout)
    across = len(contents) if len(contents) < 4 else 2 if len(contents) == 4 else 4
    down = -(-len(contents) // across)
    figure = Figure(figsize=(WIDTH * across + LEGEND, HEIGHT * down + 0.6), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flat
    for index, (axes, one) in enumerate(zip(panels, contents, strict=False)):
        if one.kind == "shots":
            draw_shots(axes, one.scores, style)
        elif one.kind == "full":
            draw_full(axes, one.scores, style)
        else:
            draw_scale(axes, one.scores, style, one.columns)
        letter = f"({chr(ord('a') + index)}) " if len(contents) > 1 else ""
        axes.set_title(letter + layout.target(one.target).label, fontsize=10)
    for axes in list(panels)[len(contents) :]:
        axes.remove()
    seeds = _seeds(score for one in contents for score in one.scores.values())
    width = 20 * across + 20
    figure.suptitle("\n".join([*textwrap.wrap(title, width), *textwrap.wrap(seeds, width)]), fontsize=10)
    _legend(figure, contents, style)
    return figure


def save(figure: Figure, path: Path, suffix: str) -> None:
    """Write a figure as `png` or `svg`; the same figure gives the same bytes."""
    with rc_context({"svg.hashsalt": "boosterbit", "svg.fonttype": "none"}):
        figure.savefig(path, format=suffix, dpi=110, metadata={"Date": None} if suffix == "svg" else None)


def _legend(figure: Figure, contents: Sequence[Content], style: Style) -> None:
    place: dict[str, Any] = {"fontsize": 8, "title_fontsize": 8, "alignment": "left", "frameon": False}
    if any(one.kind == "scale" for one in contents):
        lines = {}
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                lines.setdefault(label, handle)
        names = sorted(lines)
        figure.legend([lines[name] for name in names], names, loc="outside right upper", **place)
        return
    sources = [Line2D([], [], color=colour, linewidth=3) for colour in style.colours.values()]
    names = [style.layout.source(name).label.replace("+", "\n   +", 0) for name in style.colours]
    figure.legend(sources, names, title="weights from", loc="outside right upper", **place)
    marks = [Line2D([], [], color="0.3", marker=mark, linestyle=line) for mark, line, _ in style.networks.values()]
    if any(style.networks):
        figure.legend(marks, list(style.networks), title="network", loc="outside right lower", **place)


def _seeds(scores: Iterable[Score]) -> str:
    numbers = [score.seeds for score in scores]
    if max(numbers) == 1:
        return "one seed"
    count = f"{max(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"
    return f"error bars: ± sample standard deviation over {count} seeds"


def _sorted(scores: Mapping[Cell, Score], wanted: set[Cell], layout: Layout) -> dict[Cell, Score]:
    return {cell: scores[cell] for cell in sorted(wanted, key=lambda cell: (layout.order(cell), cell.shots))}
