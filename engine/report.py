"""`python -m engine.report RESULTS.jsonl [--plot FILE.png]`: fine-tuning results as a table and a figure."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine import cli
from engine.fewshot import in_words
from loaders.errors import UserError

ABOUT = """Mean and sample standard deviation over seeds, for each target, source of the weights, and number of shots.

  python -m engine.report runs/finetune.jsonl
  python -m engine.report runs/a.jsonl runs/b.jsonl --plot transfer.png

A run that was repeated (same target, source, network, shots and seed) counts once: its newest line."""
METRICS = {"top1": "top-1, %", "mean_auc": "mean AUC, %"}
NEEDED = ("metric_value", "metric", "seed", "shot", "pretrained_model", "dataset")


@dataclass(frozen=True)
class Score:
    """A metric over the seeds of one setting."""

    mean: float  # percent
    deviation: float | None  # sample standard deviation, percent; None of one seed
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.deviation is None else f"{self.mean:.1f} ± {self.deviation:.1f}"


def read(paths: Sequence[str | Path]) -> list[dict]:
    """The result lines of several files, each run once. UserError where a file or a line is not of that kind."""
    newest: dict[tuple, dict] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"there are no results at {path}; engine.finetune appends them to results=…")
        for number, text in enumerate(path.read_text().splitlines(), 1):
            try:
                line = json.loads(text)
                missing = [name for name in NEEDED if name not in line]
            except (ValueError, TypeError) as error:
                raise UserError(f"{path}, line {number}: not a line of results ({error})") from error
            if missing:
                raise UserError(f"{path}, line {number}: a result lacks {', '.join(missing)}")
            run = (*(line[name] for name in NEEDED[1:]), line.get("network"))
            newest.pop(run, None)  # the order is that of the newest lines
            newest[run] = line
    if not newest:
        raise UserError(f"no results in {', '.join(map(str, paths))}")
    return list(newest.values())


def scores(lines: Sequence[Mapping]) -> dict[str, dict[str, Score]]:
    """Source of the weights → shots → score, of the lines of one target."""
    values: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        values.setdefault(line["pretrained_model"], {}).setdefault(str(line["shot"]), []).append(line["metric_value"])
    return {
        source: {
            shots: Score(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))
            for shots, found in by_shots.items()
        }
        for source, by_shots in values.items()
    }


def all_shots(table: Mapping[str, Mapping[str, Score]]) -> list[str]:
    """The numbers of shots in a table, fewest first, full last."""
    found = {shots for by_shots in table.values() for shots in by_shots}
    return sorted(found, key=lambda shots: (shots == "full", int(shots) if shots.isdigit() else 0))


def text(title: str, table: Mapping[str, Mapping[str, Score]]) -> str:
    """One target's table for people."""
    columns = all_shots(table)
    seeds = [score.seeds for by_shots in table.values() for score in by_shots.values()]
    names = [label(source) for source in table]
    width = max(map(len, [title, *names])) + 2
    rows = [title.ljust(width) + "".join(f"{in_words(shots):>16}" for shots in columns)]
    for name, by_shots in zip(names, table.values(), strict=True):
        rows.append(name.ljust(width) + "".join(f"{str(by_shots.get(shots, '–')):>16}" for shots in columns))
    count = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    rows.append("one seed" if max(seeds) == 1 else f"mean ± sample standard deviation over {count} seeds")
    return "\n".join(rows)


def label(source: str) -> str:
    """A source of weights, for people."""
    return "random weights" if source == "random" else f"pre-trained: {source}"


def plot(tables: Mapping[tuple[str, str], Mapping[str, Mapping[str, Score]]], picture: Path) -> None:
    """One panel for each target: the metric over the shots, a line for each source."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.8 + 4.2 * len(tables), 3.6), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, ((dataset, metric), table) in zip(panels, tables.items(), strict=True):
        columns = all_shots(table)
        for source, by_shots in table.items():
            at = [index for index, shots in enumerate(columns) if shots in by_shots]
            found = [by_shots[columns[index]] for index in at]
            spread = [score.deviation or 0.0 for score in found]
            axes.errorbar(at, [score.mean for score in found], spread, marker="o", capsize=3, label=label(source))
        axes.set(xticks=range(len(columns)), xticklabels=columns, xlabel="training images per class")
        axes.set(ylabel=METRICS.get(metric, metric), title=dataset)
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(picture, dpi=110)


def report(results: Sequence[str | Path], picture: Path | None = None) -> str:
    """The tables of result files; their figure goes to `picture`. UserError where there are no results."""
    lines = read(results)
    tables = {}
    for target in dict.fromkeys((line["dataset"], line["metric"]) for line in lines):
        tables[target] = scores([line for line in lines if (line["dataset"], line["metric"]) == target])
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
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
