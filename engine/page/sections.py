"""What of runs and results stands on a page: tables and charts, no layout."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from engine.monitoring.ranks import Timing
from engine.page.charts import Chart, Series
from engine.page.document import Bars, Section, Table
from engine.page.runs import Run
from engine.transfer.fewshot import in_words
from engine.transfer.results import Result
from engine.transfer.tables import MAJORITY, label, tables

CURVES = (
    # kind of event, name of the value, title, unit; dots
    ("train", "loss", "Training loss", "loss", False),
    ("val", "loss", "Evaluation loss", "loss", True),
    ("val", "top1", "Evaluation: top-1", "%", True),
    ("val", "mean_auc", "Evaluation: mean AUC", "%", True),
    ("train", "learning_rate", "Learning rate", "rate", False),
    ("train", "images_per_second", "Throughput", "images/s", False),
)
PARTS = {"input": "input", "forward and backward": "compute", "waiting for others": "wait", "optimizer": "optimizer",
         "other": "other"}  # fmt: skip
"""Of a step → the column of a run's timing."""
MOST_RANKS = 16
"""Of which a run's bars are shown."""
SCORES = {"top1": "top-1, %", "mean_auc": "mean AUC, %", "loss": "evaluation loss"}


def of_runs(runs: Sequence[Run]) -> list[Section]:
    """Overview, curves, throughput, configuration, and environment of runs."""
    return [_overview(runs), _curves(runs), _configuration(runs), _environment(runs)]


def _overview(runs: Sequence[Run]) -> Section:
    scores = [name for name in SCORES if any(run.points("val", name) for run in runs)]
    head = ["run", "network", "steps", "training loss", *(SCORES[name] for name in scores), "images/s", "input, %"]
    rows = []
    for run in runs:
        losses = run.points("train", "loss")
        rates = [y for _, y in run.points("train", "images_per_second")]
        waits = [y for _, y in run.points("train", "data_wait")]
        values = [run.points("val", name) for name in scores]
        rows.append([
            run.name,
            run.config.get("model.name", "–"),
            f"{run.last_step:,}",
            *(f"{found[-1][1]:.4g}" if found else "–" for found in (losses, *values)),
            f"{statistics.median(rates):,.0f}" if rates else "–",
            f"{100 * statistics.median(waits):.1f}" if waits else "–",
        ])  # fmt: skip
    about = "Scores of the last evaluation; images/s and the share of time in which a step waits for input are medians."
    return Section("Runs", about, tables=[Table("", head, rows, looks=True)])


def _curves(runs: Sequence[Run]) -> Section:
    charts = []
    for kind, name, title, unit, marked in CURVES:
        points = [[point for point in run.points(kind, name) if math.isfinite(point[1])] for run in runs]
        series = [Series(run.name, look, points[look], marked) for look, run in enumerate(runs) if points[look]]
        charts += [Chart(title, "step", unit, series)] if series else []
    return Section("Curves", "All over completed steps; zooming one zooms all.", charts=charts)


def of_times(times: Mapping[str, tuple[Timing, str]]) -> list[Section]:
    """Where the time of runs went, rank by rank: run → its timing, and what it was found to be bound by."""
    bars = []
    for name, (timing, said) in times.items():
        table = {part: 1e3 * np.nan_to_num(timing.table[column]) for part, column in PARTS.items()}
        whole = np.sum(list(table.values()), axis=0)
        shown = range(len(whole)) if len(whole) <= MOST_RANKS else _telling(whole)
        rows = [
            (f"rank {rank}, {timing.known.hosts[rank]}", [float(table[part][rank]) for part in PARTS]) for rank in shown
        ]
        left_out = f" {len(shown)} of {len(whole)} ranks: those that are apart most." if len(shown) < len(whole) else ""
        bars.append(Bars(name, list(PARTS), rows, "ms a step", said + left_out))
    about = "Means over a run, of each rank: what it does itself, and what it waits for."
    return [Section("Where the time went", about, bars=bars)] if bars else []


def _telling(values: np.ndarray) -> list[int]:
    """Ranks whose value is farthest from the median, in their order."""
    far = np.argsort(-np.abs(values - np.median(values)), kind="stable")[:MOST_RANKS]
    return sorted(far.tolist())


def _configuration(runs: Sequence[Run]) -> Section:
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    values = {key: [run.config.get(key, "–") for run in runs] for key in keys}
    head = ["key", *(run.name for run in runs)]
    different = [[key, *row] for key, row in values.items() if len(set(row)) > 1]
    found = [Table("What differs", head, different)] if different else []
    same = [[key, row[0]] for key, row in values.items() if len(set(row)) == 1]
    name = "What all have in common" if len(runs) > 1 else "All settings"
    return Section("Configuration", "", tables=[*found, Table(name, ["key", "value"], same, folded=True)])


def _environment(runs: Sequence[Run]) -> Section:
    rows = {
        "command": [run.command for run in runs],
        "folder": [str(run.folder) for run in runs],
        "begun": [run.environment.get("time", "–") for run in runs],
        "commit": [run.environment.get("commit") or "–" for run in runs],
        "hardware": [_hardware(run) for run in runs],
        "versions": [", ".join(f"{name} {value}" for name, value in _versions(run).items() if value) for run in runs],
    }
    head = ["", *(run.name for run in runs)]
    return Section("Environment", "", tables=[Table("", head, [[name, *map(str, row)] for name, row in rows.items()])])


def _hardware(run: Run) -> str:
    told, gpu = run.environment, run.environment.get("gpu")
    one = gpu["name"] if isinstance(gpu, dict) and "name" in gpu else told.get("processor", "–")
    return f"{told.get('ranks', '?')} ranks ({told.get('communicator', '?')}), {one}"


def _versions(run: Run) -> dict[str, object]:
    found = run.environment.get("versions")
    return found if isinstance(found, dict) else {}


def of_results(results: Sequence[Result], progress: str = "") -> list[Section]:
    """Scores of fine-tuning: a table of each target, as the paper lays them out, and a chart over the shots.

    progress: of a sweep that still runs.
    """
    found = tables(results)
    sources = list(dict.fromkeys(source for table, _ in found for source in table.scores))
    shown, charts = [], []
    for table, own in found:
        title = f"{table.dataset}: {table.unit}"
        rows = [[label(source), *(str(scored.get(shots, "–")) for shots in table.shots)]
                for source, scored in table.scores.items()]  # fmt: skip
        if table.majority is not None:
            rows.append([MAJORITY, *[f"{table.majority:.1f}"] * len(table.shots)])
        shown.append(Table(title, ["source", *map(in_words, table.shots)], rows, note=_off(own)))
        numbers = [shots for shots in table.shots if shots.isdigit()]
        series = [
            Series(label(source), sources.index(source),
                   [(float(shots), scored[shots].mean) for shots in numbers if shots in scored], marked=True)
            for source, scored in table.scores.items()
        ]  # fmt: skip
        if len(numbers) > 1:
            charts.append(Chart(title, "training images per class", table.unit, series, logarithmic=True))
    about = "Mean ± sample standard deviation over seeds. " + progress
    return [Section("Scores", about.strip(), tables=shown, charts=charts, looks=[label(source) for source in sources])]


def _off(results: Sequence[Result]) -> str:
    off = [(one.interval[1] - one.interval[0]) / 2 for one in results if one.interval]
    return f"A score is ± {max(off):.1f} by its test images (95%)." if off else ""
