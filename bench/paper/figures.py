"""Results as figures: the paper's Figures 1, 2 and 4 to 8, and one for each target that has more than these show."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.paper.names import MAJORITY, Cell, Layout, Panel, metric_label, target_name
from bench.paper.panels import SHARE, Style, draw_full, draw_scale, draw_shots
from engine.transfer.results import Score

WIDTH, HEIGHT, LEGEND = 4.3, 3.5, 2.4
"""Of a panel, and of the legend beside all of them, inches."""
BAR, AROUND = 0.18, 0.8
"""Height that a bar needs, and that a panel of bars needs besides, inches."""


@dataclass(frozen=True)
class Content:
    """A panel and what is in it."""

    kind: str
    target: str
    scores: Mapping[Cell, Score]
    columns: Mapping[str, str]  # scale: source → column of Table 1


def figures(scores: Mapping[Cell, Score], layout: Layout) -> dict[str, Figure]:
    """Name → figure, of those that have anything to show."""
    scores = {cell: score for cell, score in scores.items() if math.isfinite(score.mean)}
    shares = {cell for cell in scores if cell.source == MAJORITY}
    drawn, shown = {}, set()
    for spec in layout.figures:
        if contents := _worthwhile([content(panel, scores, layout) for panel in spec.panels]):
            drawn[spec.name] = draw(spec.title, contents, layout)
            shown |= {cell for one in contents for cell in one.scores}
    for target, metric in dict.fromkeys((cell.target, cell.metric) for cell in scores if cell not in shown | shares):
        found = {cell: score for cell, score in scores.items() if (cell.target, cell.metric) == (target, metric)}
        label = layout.target(target).label
        title = f"{label}: {metric_label(metric).removesuffix(', %')} over shots and sources"
        drawn[target_name(layout.target(target), metric)] = draw(title, generic(found, layout), layout)
    return drawn


def content(panel: Panel, scores: Mapping[Cell, Score], layout: Layout) -> Content:
    """What results there are for a panel of the paper; bars in place of curves that have but one point, full shot."""
    target = layout.targets[panel.target]
    columns: dict[str, str] = {}
    for name in panel.sources:
        if name in layout.tables[0].columns and (source := layout.column(target.name, name)):
            columns |= {source: name, layout.source(source).prefer or source: name}
    wanted = {
        cell
        for cell in scores
        if (cell.target, cell.metric) == (target.name, target.metric)
        and (
            (cell.source in columns and layout.preferred(cell, scores) == cell)
            or layout.source(cell.source).domain in panel.sources
            or cell.source == MAJORITY
        )
        and (panel.kind == "shots" or cell.shots == "full")
    }
    if all(cell.source == MAJORITY for cell in wanted):
        wanted = set()
    alone = panel.kind == "shots" and {cell.shots for cell in wanted} == {"full"}
    return Content("full" if alone else panel.kind, target.name, _sorted(scores, wanted, layout), columns)


def _worthwhile(contents: Sequence[Content]) -> list[Content]:
    """Those with results, but no bars that are among the bars of a later panel."""
    bars = [set(one.scores) if one.kind == "full" else set() for one in contents]
    return [
        one
        for index, one in enumerate(contents)
        if one.scores and not any(bars[index] and bars[index] <= others for others in bars[index + 1 :])
    ]


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
    height = max([HEIGHT, *(BAR * len(one.scores) + AROUND for one in contents if one.kind == "full")])
    figure = Figure(figsize=(WIDTH * across + LEGEND, height * down + 0.6), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for index, (axes, one) in enumerate(zip(panels, contents, strict=False)):
        if one.kind == "shots":
            draw_shots(axes, one.scores, style)
        elif one.kind == "full":
            draw_full(axes, one.scores, style)
        else:
            draw_scale(axes, one.scores, style, one.columns)
        if len(contents) > 1:
            axes.set_title(f"({chr(ord('a') + index)}) {_about(one, layout)}", fontsize=10)
    for axes in panels[len(contents) :]:
        axes.remove()
    seeds = _seeds(score for one in contents for score in one.scores.values())
    width = round(12 * WIDTH * across)
    figure.suptitle(
        "\n".join([*textwrap.wrap(title, width), *textwrap.wrap(seeds, width)]), fontsize=10, x=0.01, ha="left"
    )
    if any(one.kind != "full" for one in contents):  # bars say themselves what they are
        _legend(figure, contents, style)
    return figure


def save(figure: Figure, path: Path, suffix: str) -> None:
    """Write a figure as `png` or `svg`; the same figure gives the same bytes."""
    with rc_context({"svg.hashsalt": "boosterbit", "svg.fonttype": "none"}):
        figure.savefig(path, format=suffix, dpi=110, metadata={"Date": None} if suffix == "svg" else None)


def _about(one: Content, layout: Layout) -> str:
    """A panel in words: its target, and what all that it shows has in common."""
    label = layout.target(one.target).label
    if one.kind == "full":
        return f"{label}, full shot"
    domains = {layout.source(cell.source).domain for cell in one.scores if cell.source != MAJORITY}
    single = domains.pop() if len(domains) == 1 else None
    return f"{label}, {single} sources" if single else label


def _legend(figure: Figure, contents: Sequence[Content], style: Style) -> None:
    """Beside the panels: colours of sources, then marks of networks; of scale panels, their own lines."""
    entries: list[tuple[Any, str]] = []
    if any(one.kind == "scale" for one in contents):
        found = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
        entries = list({label: (handle, label) for handle, label in found}.values())
    else:
        nothing = Line2D([], [], linestyle="none")
        entries.append((nothing, "weights from"))
        for source, colour in style.colours.items():
            entries.append((Line2D([], [], color=colour, linewidth=3), style.layout.source(source).label))
        if any(style.networks):
            entries += [(nothing, ""), (nothing, "network")]
        for network, (mark, dashes, _, _) in style.networks.items():
            entries.append((Line2D([], [], color="0.3", marker=mark, linestyle=dashes), network or "unknown"))
        if any(cell.source == MAJORITY for one in contents for cell in one.scores):
            entries += [(nothing, ""), (Line2D([], [], **SHARE), MAJORITY)]
    handles, labels = zip(*entries, strict=True)
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False, handlelength=2.8)


def _seeds(scores: Iterable[Score]) -> str:
    numbers = [score.seeds for score in scores if score.seeds]
    if max(numbers) == 1:
        return "one seed"
    count = f"{max(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"
    return f"error bars: ± sample standard deviation over {count} seeds"


def _sorted(scores: Mapping[Cell, Score], wanted: set[Cell], layout: Layout) -> dict[Cell, Score]:
    return {cell: scores[cell] for cell in sorted(wanted, key=lambda cell: (layout.order(cell), cell.shots))}
