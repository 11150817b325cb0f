"""A scaling sweep as a page that needs no server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.model.report import CAUSES, Row
from engine.page import Chart, Section, Series, Table, write

PAPER = "paper, Table 2"


def scaling_page(
    rows: Sequence[Row], published: Mapping[int, float] | None, place: Path, title: str, facts: Mapping[str, str]
) -> int:
    """Rows of a sweep beside those of the paper (GPUs → images/s, with one GPU); returns the page's bytes.

    facts: what the rows rest on, for a table.
    """
    name = rows[0].source
    theirs = {n: rate for n, rate in (published or {}).items() if n <= rows[-1].gpus}
    names = [name, *([PAPER] if theirs else [])]

    def chart(title: str, unit: str, ours: Sequence[float], paper: Sequence[float]) -> Chart:
        lines = [Series(name, 0, [(row.gpus, y) for row, y in zip(rows, ours, strict=True)], marked=True)]
        lines += [Series(PAPER, 1, list(zip(theirs, paper, strict=True)), marked=True)] if theirs else []
        return Chart(title, "GPUs", unit, lines, logarithmic=True)

    efficiencies = [100 * rate / theirs[1] / n for n, rate in theirs.items()]
    charts = [
        chart("Efficiency", "%", [row.efficiency for row in rows], efficiencies),
        chart("Throughput of a GPU", "images/s", [row.images_per_second / row.gpus for row in rows],
              [rate / n for n, rate in theirs.items()]),
    ]  # fmt: skip
    head = ["GPUs", "images/s", "speedup", "E(N), %", *([f"{PAPER}: images/s", "E(N), %"] if theirs else [])]
    shown = [
        [f"{row.gpus:,}", f"{row.images_per_second:,.2f}", f"{row.speedup:.2f}", f"{row.efficiency:.2f}",
         *([f"{theirs[row.gpus]:,.2f}", f"{100 * theirs[row.gpus] / theirs[1] / row.gpus:.2f}"] if row.gpus in theirs
           else ["–", "–"] if theirs else [])]
        for row in rows
    ]  # fmt: skip
    about = f"All rows are {name}. E(N) is 100 T(N) / (N T(1)), with T images/s."
    sections = [Section("Scaling", about, tables=[Table("", head, shown)], charts=charts, looks=names)]
    if "lost_percent" in rows[0].more:
        lost = [[f"{row.gpus:,}", *(f"{row.more['lost_percent'][cause]:.2f}" for cause in CAUSES)] for row in rows]
        note = "; ".join(f"{cause}: {text}" for cause, text in CAUSES.items()) + "."
        sections.append(Section("Where the lost percent go", note, tables=[Table("", ["GPUs", *CAUSES], lost)]))
    sections.append(Section("What it rests on", "", tables=[Table("", ["", ""], [[*pair] for pair in facts.items()])]))
    return write(place, title, sections, names)
