"""`python -m engine.report RESULTS.jsonl`: fine-tuning results as tables and a figure; runs side by side as a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine import cli, whole
from engine.statistics import paired
from engine.transfer.fewshot import by_shots, in_words
from engine.transfer.results import Result, read, score
from engine.transfer.tables import MAJORITY, Table, label, tables
from loaders.arguments import as_path, as_place, program
from loaders.errors import UserError
from loaders.output import as_command

if TYPE_CHECKING:
    from engine.monitoring.ranks import Timing

ABOUT = """Mean and sample standard deviation over seeds, for each target, source of the weights, and number of shots.

  python -m engine.report runs/finetune.jsonl
  python -m engine.report runs/a.jsonl runs/b.jsonl --plot transfer.png
  python -m engine.report runs/finetune.jsonl --against random --classes
  python -m engine.report page runs/a runs/b --out page.html     (runs side by side; page --help)

A run that was repeated (same target, source, network, shots and seed) counts once: its newest line."""
_WIDE = 34  # characters of a difference


def text(table: Table) -> str:
    """One target's table for people."""
    title = f"{table.dataset}: {table.unit}"
    seeds = [score.seeds for scored in table.scores.values() for score in scored.values()]
    rows = {label(source): [str(scored.get(shots, "–")) for shots in table.shots]
            for source, scored in table.scores.items()}  # fmt: skip
    if table.majority is not None:
        rows[MAJORITY] = [f"{table.majority:.1f}"] * len(table.shots)
    width = max(map(len, [title, *rows])) + 2
    lines = [title.ljust(width) + "".join(f"{in_words(shots):>16}" for shots in table.shots)]
    lines += [name.ljust(width) + "".join(f"{each:>16}" for each in row) for name, row in rows.items()]
    count = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    lines.append("one seed" if max(seeds) == 1 else f"mean ± sample standard deviation over {count} seeds")
    return "\n".join(lines)


def differences(results: Sequence[Result], against: str) -> dict[str, dict[str, paired.Difference]]:
    """Source → shots → its difference to the source `against`, of one target's results: same network, same seeds.

    Differences without two seeds in common are left out. UserError where there is no such source.
    """
    known = sorted({result.source for result in results})
    if against not in known:
        raise UserError(f"--against {against}: no source of {results[0].dataset}; there are {', '.join(known)}")
    values: dict[tuple[str, str | None, str], dict[int, float]] = {}
    for result in results:
        values.setdefault((result.source, result.network, result.shots), {})[result.seed] = result.value
    several = len({result.network for result in results}) > 1
    found: dict[str, dict[str, paired.Difference]] = {}
    for (source, network, shots), ours in values.items():
        one = paired.difference(ours, values.get((against, network, shots), {}))
        if source != against and one is not None:
            found.setdefault(f"{source} ({network})" if several else source, {})[shots] = one
    return found


def differences_text(title: str, table: Mapping[str, Mapping[str, paired.Difference]], against: str) -> str:
    """One target's differences for people."""
    columns = sorted({shots for found in table.values() for shots in found}, key=by_shots)
    if not columns:
        return f"{title}: no source has two seeds in common with {against}"
    each = [(source, shots) for source, found in table.items() for shots in found]
    adjusted = dict(zip(each, paired.holm([table[source][shots].p for source, shots in each]), strict=True))
    names = {source: label(source) for source in table}
    width = max(map(len, [title, *names.values()])) + 2
    rows = [title.ljust(width) + "".join(f"{in_words(shots):>{_WIDE}}" for shots in columns)]
    for source, found in table.items():
        cells = []
        for shots in columns:
            one = found.get(shots)
            cells.append("–" if one is None else _difference(one, adjusted[source, shots]))
        rows.append(names[source].ljust(width) + "".join(f"{cell:>{_WIDE}}" for cell in cells))
    seeds = sorted({one.seeds for found in table.values() for one in found.values()})
    rows.append(
        f"difference to {label(against)} on the same seeds ({' or '.join(map(str, seeds))}): mean, 95% interval of the "
        f"paired t-test, p adjusted for the {len(each)} comparisons here (Holm)"
    )
    return "\n".join(rows)


def _difference(one: paired.Difference, p: float) -> str:
    probable = f"p {p:.3f}" if p >= 0.001 else "p < 0.001"
    return f"{one.mean:+.1f} ({one.low:+.1f} to {one.high:+.1f}) {probable}"


def classes_text(title: str, results: Sequence[Result]) -> str:
    """The scores of each class for people: means over seeds, for each source and number of shots of one target."""
    scored = [result for result in results if result.classes]
    if not scored:
        return f"{title}: no result says how single classes were scored"
    names = list(dict.fromkeys(name for result in scored for name in result.classes))
    settings = dict.fromkeys((result.source, result.network, result.shots) for result in scored)
    lines = [f"{title}, of each class"]
    wide = max(map(len, names)) + 2
    for source, network, shots in sorted(settings, key=lambda each: (each[:1], str(each[1]), by_shots(each[2]))):
        same = [one for one in scored if (one.source, one.network, one.shots) == (source, network, shots)]
        off = [(one.interval[1] - one.interval[0]) / 2 for one in same if one.interval]
        said = f"; a score is ± {max(off):.1f} by its test images (95%)" if off else ""
        lines.append(f"{label(source)}, {in_words(shots)}{said}")
        for name in names:
            values = [one.classes[name] for one in same if name in one.classes]
            lines.append(f"  {name.ljust(wide)}{score(values)!s:>14}" if values else f"  {name.ljust(wide)}{'–':>14}")
    return "\n".join(lines)


def plot(tables: Sequence[Table], picture: Path) -> None:
    """One panel for each target: the metric over the shots, a line for each source, the same in all panels; a single
    score is written as a number.

    UserError for a name that does not end as pictures do.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.3 + 4.2 * len(tables), 3.6), layout="constrained")
    sources = list(dict.fromkeys(source for table in tables for source in table.scores))
    look = {
        source: {
            "color": f"C{index % 10}",
            "linestyle": ("-", "--", ":", "-.")[index // 10 % 4],
            "label": label(source),
        }
        for index, source in enumerate(sources)
    }
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, table in zip(panels, tables, strict=True):
        axes.set_title(table.dataset)
        if table.points == 1:
            axes.set_axis_off()
            axes.text(0.5, 0.5, _in_words(table), ha="center", va="center", fontsize=12, transform=axes.transAxes)
            continue
        columns = table.shots
        for source, scored in table.scores.items():
            at = [index for index, shots in enumerate(columns) if shots in scored]
            found = [scored[columns[index]] for index in at]
            spread = [score.deviation or 0.0 for score in found]
            axes.errorbar(at, [score.mean for score in found], spread, marker="o", capsize=3, **look[source])
        if table.majority is not None:
            axes.axhline(table.majority, color="0.5", linestyle=(0, (1, 1)), label=MAJORITY)
        axes.set(xticks=range(len(columns)), xticklabels=columns, xlabel="training images per class")
        axes.set_ylabel(table.unit)
        axes.grid(alpha=0.3)
    shown = [axes.get_legend_handles_labels() for axes in panels]
    entries = {name: handle for handles, names in shown for handle, name in zip(handles, names, strict=True)}
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside right upper", fontsize=8, frameon=False)
    whole.picture(figure, picture)


def _in_words(table: Table) -> str:
    ((source, scored),) = table.scores.items()
    ((shots, score),) = scored.items()
    lines = [f"{table.unit}: {score}", label(source), in_words(shots)]
    return "\n".join(lines + ([] if table.majority is None else [f"{MAJORITY}: {table.majority:.1f}"]))


def report(
    results: Sequence[str | Path], picture: Path | None = None, against: str | None = None, classes: bool = False
) -> str:
    """The tables of result files; their figure goes to `picture`. UserError where there are no results.

    `against`: a source that the others are compared with. `classes`: also the scores of single classes.
    """
    found = tables(read(results))
    if picture is not None:
        plot([table for table, _ in found], picture)
    said = []
    for table, own in found:
        title = f"{table.dataset}: {table.unit}"
        said.append(text(table))
        said += [differences_text(title, differences(own, against), against)] if against else []
        said += [classes_text(title, own)] if classes else []
    return "\n\n".join(said)


PAGE = """Runs and results side by side on one page: a file without a server, which loads nothing from elsewhere.

  python -m engine.report page runs/a runs/b --out page.html
  python -m engine.report page runs/sweep/results.jsonl sweep.yaml --out scores.html

What may be named: folders of runs, files of results (JSONL or CSV), and sweep files, also of sweeps that still run."""


def page(places: Sequence[Path], out: Path, title: str | None, sheets: bool) -> str:
    """Write the page of runs, results and sweeps; returns what to say. UserError for a place that is none of them."""
    from engine import page as pages
    from engine import sweep
    from engine.transfer import sweep_file

    folders = [place for place in places if place.is_dir()]
    results = [place for place in places if place.suffix.lower() in (".jsonl", ".csv")]
    sweeps = [place for place in places if place.suffix.lower() in (".yaml", ".yml")]
    if strange := [place for place in places if place not in (*folders, *results, *sweeps)]:
        raise UserError(f"{strange[0]} is no folder of a run, no results (.jsonl, .csv) and no sweep (.yaml)")
    sections, progress = [], []
    runs = pages.read(folders)
    if runs:
        overview, curves, *settings = pages.of_runs(runs)
        times = pages.of_times({run.name: found for run in runs if (found := _times(run.folder))})
        sections += [overview, curves, *times, *(pages.of_inputs(runs) if sheets else []), *settings]
    for path in sweeps:
        one = sweep_file.read(path)
        left = len(sweep.missing(one))
        progress.append(f"{path}: {len(one.runs) - left} of {len(one.runs)} runs are done.")
        results += [one.results] if one.results.exists() else []
    if results or sweeps:
        sections += pages.of_results(read(results) if results else [], " ".join(progress))
    size = pages.write(out, title or ", ".join(place.name for place in places), sections, [run.name for run in runs])
    return f"page: {out} ({size / 1e3:,.0f} kB)"


def _times(folder: Path) -> tuple[Timing, str] | None:
    from engine.doctor import diagnosed
    from engine.monitoring import ranks

    if not (folder / ranks.FILE).exists():
        return None
    timing, _, said = diagnosed(folder)
    return timing, said


def _page_command(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"{program('engine.report')} page", description=PAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("places", nargs="+", type=as_path, metavar="RUN", help="folder of a run, results, or a sweep")
    parser.add_argument("--out", type=as_path, default=Path("page.html"), metavar="FILE.html", help="(%(default)s)")
    parser.add_argument("--title", help="of the page (the names of what it shows)")
    parser.add_argument("--no-inputs", action="store_true", help="without sheets of the images as the runs saw them")
    chosen = parser.parse_args(argv)
    cli.guard(lambda: print(page(chosen.places, chosen.out, chosen.title, not chosen.no_inputs)))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["page"]:
        _page_command(argv[1:])
        return
    parser = argparse.ArgumentParser(
        prog=program("engine.report"), description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", nargs="+", type=as_place, metavar="RESULTS.jsonl", help="files that engine.finetune appended to"
    )
    parser.add_argument("--plot", type=as_path, metavar="FILE.png", help="draw a figure as well")
    parser.add_argument("--against", metavar="SOURCE", help="differences to this source, seed by seed, with a test")
    parser.add_argument("--classes", action="store_true", help="the scores of each class, too")
    arguments = parser.parse_args(argv)
    cli.guard(lambda: print(report(arguments.results, arguments.plot, arguments.against, arguments.classes)))


if __name__ == "__main__":
    as_command(main)
