"""How one panel of results is drawn: curves over shots, bars of full shot, lines over source data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.paper.names import MAJORITY, Cell, Layout, metric_label
from engine.transfer.fewshot import by_shots, in_words
from engine.transfer.results import Score

NATURAL = {"imagenet1k": "#E69F00", "imagenet21k": "#D55E00"}
"""The natural sources look alike in every figure."""
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#BBCC33", "#999933", "#882255", "#332288", "#DDCC77", "#44AA99",
           "#117733", "#AA4499", "#661100", "#6699CC", "#EE8866", "#F0E442")  # fmt: skip
"""For the others in turn. These are of the palettes of Okabe and Ito and of Tol, made for colour-blind readers too."""
NETWORKS = (("o", "-", "", "#000000"), ("s", "--", "///", "#777777"), ("^", ":", "...", "#444444"),
            ("D", "-.", "xx", "#AAAAAA"))  # fmt: skip
"""Marker, line and hatch of the networks in turn, and their grey where colour does not tell the source: no source has
one."""
SHARE: Mapping[str, Any] = {"color": "#B0B0B0", "linestyle": (0, (1, 1)), "linewidth": 1.5}
"""How the line of the majority class is drawn."""
DODGE = 0.05
"""Between neighbouring lines, of the distance between two numbers of shots: so that error bars are told apart."""
WIDEST = 0.8
"""Between the first and the last line, likewise; many lines move together rather than into the next number's place."""


@dataclass(frozen=True)
class Style:
    """What a figure's sources and networks look like."""

    layout: Layout
    colours: Mapping[str, str]  # by source
    networks: Mapping[str, tuple[Any, Any, str, str]]  # marker, line (matplotlib's words), hatch, colour

    @classmethod
    def of(cls, cells: Iterable[Cell], layout: Layout) -> Style:
        """The style of a figure with these cells. The paper's networks keep their marks where one of them is there."""
        cells = sorted((cell for cell in cells if cell.source != MAJORITY), key=layout.order)
        sources, networks = (dict.fromkeys(getattr(cell, name) for cell in cells) for name in ("source", "network"))
        others = [name for name in sources if name not in NATURAL]
        colours = NATURAL | {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(others)}
        known = [*layout.networks] if set(networks) & set(layout.networks) else []
        ordered = [*known, *sorted(set(networks) - set(known))]
        marks = {name: NETWORKS[index % len(NETWORKS)] for index, name in enumerate(ordered)}
        return cls(
            layout,
            {name: colours[name] for name in sources},
            {name: look for name, look in marks.items() if name in networks},
        )

    def line(self, cell: Cell) -> dict[str, Any]:
        """How the line of a source and a network is drawn."""
        marker, dashes, _, _ = self.networks[cell.network]
        return {"color": self.colours[cell.source], "marker": marker, "linestyle": dashes, "markersize": 4.5}

    def label(self, cell: Cell) -> str:
        """Source and network, for people."""
        source = self.layout.source(cell.source).label
        return f"{source}, {cell.network}" if cell.network else source


def draw_shots(axes: Any, scores: Mapping[Cell, Score], style: Style) -> None:
    """A line for each source and network: the score over training images of each class, full last. Of one a number."""
    scores, share = _apart(scores)
    if _single(axes, scores, share, style):
        return
    shots = sorted({cell.shots for cell in scores}, key=by_shots)
    lines = dict.fromkeys((cell.source, cell.network) for cell in scores)
    dodge = min(DODGE, WIDEST / len(lines))
    for index, pair in enumerate(lines):
        found = {cell.shots: (cell, score) for cell, score in scores.items() if (cell.source, cell.network) == pair}
        present = [number for number in shots if number in found]
        cell = found[present[0]][0]
        at = [shots.index(number) + dodge * (index - (len(lines) - 1) / 2) for number in present]
        _errorbar(axes, at, [found[number][1] for number in present], style.label(cell), style.line(cell))
    axes.set(
        xticks=range(len(shots)),
        xticklabels=shots,
        xlabel="training images of each class",
        xlim=(-0.5, len(shots) - 0.5),
    )
    _finish(axes, scores, share)


def draw_full(axes: Any, scores: Mapping[Cell, Score], style: Style) -> None:
    """A bar for each source and network, the first on top, with its value; of one, that alone."""
    scores, share = _apart(scores)
    if _single(axes, scores, share, style):
        return
    for index, (cell, score) in enumerate(scores.items()):
        hatch = style.networks[cell.network][2]
        look = {
            "color": style.colours[cell.source],
            "alpha": 0.75,
            "hatch": hatch,
            "edgecolor": "white",
            "height": 0.75,
        }
        axes.barh(index, score.mean, xerr=score.deviation or 0.0, ecolor="0.2", capsize=2, **look)
        right = score.mean + (score.deviation or 0.0)
        axes.annotate(f"{score.mean:.1f}", (right, index), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(scores)), [style.label(cell) for cell in scores], fontsize=8)
    axes.set(ylim=(len(scores) - 0.4, -0.6), xlabel=_metric(scores))
    axes.set_xlim(0, 1.2 * max(score.mean + (score.deviation or 0.0) for score in scores.values()))
    if share is not None:
        axes.axvline(share, **SHARE, label=MAJORITY)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def draw_scale(axes: Any, scores: Mapping[Cell, Score], style: Style, columns: Mapping[str, str]) -> None:
    """A line for each network and domain: the full-shot score over sources by size; `columns` names them, by source."""
    scores, share = _apart(scores)
    if _single(axes, scores, share, style):
        return
    layout = style.layout
    images = {columns[cell.source]: layout.source(cell.source).images or 0 for cell in scores}
    ticks = sorted(images, key=images.__getitem__)
    for network, (marker, dashes, _, colour) in style.networks.items():
        for domain, look in (("medical", "white"), ("natural", colour)):
            found = [cell for cell in scores if (layout.source(cell.source).domain, cell.network) == (domain, network)]
            found.sort(key=lambda cell: images[columns[cell.source]])
            line = {"color": colour, "marker": marker, "linestyle": dashes, "markerfacecolor": look}
            at = [ticks.index(columns[cell.source]) for cell in found]
            if found:
                _errorbar(axes, at, [scores[cell] for cell in found], f"{network}, {domain} sources", line)
    labels = [f"{column}\n{_rounded(images[column])}" for column in ticks]
    axes.set_xticks(range(len(ticks)), labels, fontsize=8)
    axes.set(xlim=(-0.4, len(ticks) - 0.6), xlabel="source, images")
    _finish(axes, scores, share)


def _errorbar(axes: Any, at: Sequence[float], scores: Sequence[Score], label: str, look: Mapping[str, Any]) -> None:
    spread = [score.deviation or 0.0 for score in scores]
    drawn = axes.errorbar(at, [score.mean for score in scores], spread, capsize=2, elinewidth=0.8, label=label, **look)
    for part in (*drawn[1], *drawn[2]):  # so that they do not hide lines
        part.set_alpha(0.6)


def _apart(scores: Mapping[Cell, Score]) -> tuple[dict[Cell, Score], float | None]:
    """The scores of sources, and that of the majority class, where there is one."""
    shares = [score.mean for cell, score in scores.items() if cell.source == MAJORITY]
    return {cell: score for cell, score in scores.items() if cell.source != MAJORITY}, next(iter(shares), None)


def _single(axes: Any, scores: Mapping[Cell, Score], share: float | None, style: Style) -> bool:
    """Whether there is one score only, which then is written: a number is no chart."""
    if len(scores) != 1:
        return False
    ((cell, score),) = scores.items()
    lines = [f"{_metric(scores)}: {score}", style.label(cell), in_words(cell.shots)]
    lines += [] if share is None else [f"{MAJORITY}: {share:.1f}"]
    axes.set_axis_off()
    axes.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", fontsize=11, transform=axes.transAxes)
    return True


def _finish(axes: Any, scores: Mapping[Cell, Score], share: float | None) -> None:
    if share is not None:
        axes.axhline(share, **SHARE, label=MAJORITY)
    axes.set_ylabel(_metric(scores))
    axes.grid(alpha=0.3)


def _metric(scores: Mapping[Cell, Score]) -> str:
    metric = next(iter(scores)).metric
    return metric_label(metric)


def _rounded(images: int) -> str:
    return f"{images / 1e6:g}M" if images >= 1e6 else f"{images / 1e3:.0f}K"
