"""`python -m engine.report RESULTS.jsonl [--plot FILE.png]`: fine-tuning results as a table and a figure."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine import cli
from engine.transfer.fewshot import by_shots, in_words
from engine.transfer.results import Result, Score, read, score
from engine.whole import whole
from loaders.errors import UserError

ABOUT = """Mean and sample standard deviation over seeds, for each target, source of the weights, and number of shots.

  python -m engine.report runs/finetune.jsonl
  python -m engine.report runs/a.jsonl runs/b.jsonl --plot transfer.png

A run that was repeated (same target, source, network, shots and seed) counts once: its newest line."""
METRICS = {"top1": "top-1, %", "mean_auc": "mean AUC, %"}


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


def all_shots(table: Mapping[str, Mapping[str, Score]]) -> list[str]:
    """The numbers of shots in a table, fewest first, full last."""
    return sorted({shots for found in table.values() for shots in found}, key=by_shots)


def text(title: str, table: Mapping[str, Mapping[str, Score]]) -> str:
    """One target's table for people."""
    columns = all_shots(table)
    seeds = [score.seeds for scored in table.values() for score in scored.values()]
    names = [label(source) for source in table]
    width = max(map(len, [title, *names])) + 2
    rows = [title.ljust(width) + "".join(f"{in_words(shots):>16}" for shots in columns)]
    for name, scored in zip(names, table.values(), strict=True):
        rows.append(name.ljust(width) + "".join(f"{str(scored.get(shots, '–')):>16}" for shots in columns))
    count = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    rows.append("one seed" if max(seeds) == 1 else f"mean ± sample standard deviation over {count} seeds")
    return "\n".join(rows)


def label(source: str) -> str:
    """A source of weights, for people."""
    name, _, network = source.partition(" ")
    return f"random weights {network}".strip() if name == "random" else f"pre-trained: {source}"


def plot(tables: Mapping[tuple[str, str], Mapping[str, Mapping[str, Score]]], picture: Path) -> None:
    """One panel for each target: the metric over the shots, a line for each source, the same in all panels.

    UserError for a name that does not end as pictures do.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.3 + 4.2 * len(tables), 3.6), layout="constrained")
    kind = picture.suffix.lower().removeprefix(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"--plot {picture} does not end as a picture does; expected such as .png, .svg or .pdf")
    sources = list(dict.fromkeys(source for table in tables.values() for source in table))
    look = {
        source: {
            "color": f"C{index % 10}",
            "linestyle": ("-", "--", ":", "-.")[index // 10 % 4],
            "label": label(source),
        }
        for index, source in enumerate(sources)
    }
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, ((dataset, metric), table) in zip(panels, tables.items(), strict=True):
        columns = all_shots(table)
        for source, scored in table.items():
            at = [index for index, shots in enumerate(columns) if shots in scored]
            found = [scored[columns[index]] for index in at]
            spread = [score.deviation or 0.0 for score in found]
            axes.errorbar(at, [score.mean for score in found], spread, marker="o", capsize=3, **look[source])
        axes.set(xticks=range(len(columns)), xticklabels=columns, xlabel="training images per class")
        axes.set(ylabel=METRICS.get(metric, metric), title=dataset)
        axes.grid(alpha=0.3)
    shown = [axes.get_legend_handles_labels() for axes in panels]
    entries = {name: handle for handles, names in shown for handle, name in zip(handles, names, strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside right upper", fontsize=8, frameon=False)
    with whole(picture) as temporary:
        figure.savefig(temporary, format=kind, dpi=110)


def report(results: Sequence[str | Path], picture: Path | None = None) -> str:
    """The tables of result files; their figure goes to `picture`. UserError where there are no results."""
    found = read(results)
    tables = {}
    for target in dict.fromkeys((result.dataset, result.metric) for result in found):
        tables[target] = scores([result for result in found if (result.dataset, result.metric) == target])
    if picture is not None:
        plot(tables, picture)
    return "\n\n".join(text(f"{dataset}: {METRICS.get(metric, metric)}", t) for (dataset, metric), t in tables.items())


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.report", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", metavar="RESULTS.jsonl", help="files that engine.finetune appended to")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a figure as well")
    arguments = parser.parse_args(argv)
    cli.guard(lambda: print(report(arguments.results, arguments.plot)))


if __name__ == "__main__":
    main()
