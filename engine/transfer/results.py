"""Results of fine-tuning: read from our JSONL and from the published CSV, scored over seeds, written as that CSV.

Both formats become the same `Result`s. Our lines (`engine.finetune` appends them) hold percent and the names that
they show; the published files (arXiv 2106.00116) hold fractions, `test/acc`, `10_shot`, and repeat rows.
"""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from engine.transfer.fewshot import is_share
from engine.whole import whole
from loaders.errors import UserError, reading

COLUMNS = ("metric_value", "metric", "path", "seed", "shot", "pretrained_model", "dataset", "last_step")
"""Of the published CSV, in its order."""
NEEDED = ("metric_value", "metric", "seed", "shot", "pretrained_model", "dataset")
"""Without these, a line or row says nothing."""
PUBLISHED_METRICS = {"test/acc": "top1", "test/mean_auc": "mean_auc", "test/mean_average_precision": "mean_ap"}
OF_A_CLASS = re.compile(r"(average_precision_class|f1|precision|recall)_(\d+)$")
"""Metrics of one class, by its number; the published CSV puts `test/` before them."""
PUBLISHED_DATASETS = {"padchest": "padchest_cl", "padchest_multilabel": "padchest"}
"""Where the published CSV has another name for a target. Its `padchest` is PadChest-cl, one label an image: it has few
shots and a top-1, and its mean AUC is Table 4's of PadChest-cl. So PadChest itself needs a name there: ours."""
_NETWORK = re.compile(r"_(?:bit|r)(\d+x[\d.]+(?:-\d+px)?)$")


@dataclass(frozen=True)
class Result:
    """One run's score on its target's test set."""

    dataset: str  # the target, as packed: padchest_cl, cifar10-train
    metric: str  # top1, mean_auc, mean_ap, or of one class: average_precision_class_0, f1_0, recall_0
    source: str  # what the weights come from, as it was written: imagenet21k_bit152x4, chexpert_r50x1, random
    network: str | None  # R50x1; None where neither the line nor the source's name says it
    shots: str  # training images of each class, "10"; a share of all, "10%"; or "full"
    seed: int
    value: float  # percent
    last_step: int | None = None
    path: str = ""  # folder of the run, if it kept one
    interval: tuple[float, float] | None = None  # 95%, percent, over the test images; not in the CSV, nor is `classes`
    classes: Mapping[str, float] = field(default_factory=dict, compare=False)  # score of each, percent
    weights: str | None = None  # digest of what was transferred; None where the line does not say it
    majority: float | None = None  # share of the test set's most frequent class, percent; likewise

    @property
    def run(self) -> tuple:
        """What two results of the same run share."""
        return self.dataset, self.metric, self.source, self.network, self.shots, self.seed


@dataclass(frozen=True)
class Score:
    """A metric over the seeds of one setting."""

    mean: float  # percent
    deviation: float | None  # sample standard deviation, percent; None of one seed
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.deviation is None else f"{self.mean:.1f} ± {self.deviation:.1f}"


def score(values: Sequence[float]) -> Score:
    """Mean and sample standard deviation (n - 1) of one value or more; NaN where one of them is no finite number."""
    if not all(map(math.isfinite, values)):
        return Score(math.nan, math.nan if len(values) > 1 else None, len(values))
    return Score(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def majority(results: Iterable[Result]) -> float | None:
    """The share of the most frequent class in the test set of one target's results, percent: what top-1 is compared
    with. None for another metric, or where no result says it. UserError where they say different ones."""
    said = {result.majority: result for result in results if result.metric == "top1" and result.majority is not None}
    if len(said) > 1:
        dataset = next(iter(said.values())).dataset
        shares = " and ".join(f"{share:.2f}%" for share in said)
        raise UserError(
            f"results of {dataset} are of different test sets: the share of their largest class is {shares}; give them "
            "names of their own (data.name=…)"
        )
    return next(iter(said), None)


def network_of(source: str) -> str | None:
    """The network that a source's name ends with: R50x1 of `chexpert_bit50x1` and of `chexpert_r50x1`."""
    found = _NETWORK.search(source)
    return f"R{found[1]}" if found else None


def read(paths: Iterable[str | Path]) -> list[Result]:
    """The results in files, `.csv` as published and else our JSONL; of each run the last, in the order of these.
    Different checkpoints under one name are told apart, with a warning on stderr.

    UserError where a file or a line is not of that kind, and where there is no result at all. Rows of a metric that is
    not known here are left out and counted in a warning on stderr, and so is a last line without its end, as a killed
    writer leaves it.
    """
    files = [Path(path) for path in paths]
    found: list[Result] = []
    for path in files:
        if not path.is_file():
            raise UserError(f"there are no results at {path}; engine.finetune appends them to results=…")
        with reading(path, "text, our JSONL or the published CSV"):
            content = path.read_text(encoding="utf-8-sig")  # spreadsheets begin a CSV with a mark
            found += _read_csv(path, content) if path.suffix.lower() == ".csv" else _read_jsonl(path, content)
    if not found:
        raise UserError(f"no results in {', '.join(map(str, files))}")
    newest: dict[tuple, Result] = {}
    for result in _told_apart(found):
        newest.pop(result.run, None)
        newest[result.run] = result
    return list(newest.values())


def _told_apart(results: Sequence[Result]) -> list[Result]:
    """Results whose sources have their weights' digest in the name where one name stands for several checkpoints.

    Lines without a digest, of before there was one, keep the name.
    """
    seen: dict[tuple[str, str | None], dict[str, None]] = {}
    for result in results:
        if result.weights:
            seen.setdefault((result.source, result.network), {})[result.weights] = None
    several = {source: digests for source, digests in seen.items() if len(digests) > 1}
    for (source, _), digests in several.items():
        print(
            f"warning: {source} stands for {len(digests)} different checkpoints, here told apart by digests of their "
            f"weights: {', '.join(digests)}; fine-tune with source=… to name them",
            file=sys.stderr,
        )
    return [
        replace(result, source=f"{result.source} [{result.weights}]")
        if result.weights and (result.source, result.network) in several
        else result
        for result in results
    ]


def _read_jsonl(path: Path, content: str) -> Iterator[Result]:
    lines = content.splitlines()
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not content.endswith("\n"):
                print(f"warning: {path}, line {number}: cut off, left out", file=sys.stderr)
                return
            raise UserError(f"{path}, line {number}: not a line of results ({error})") from error
        if not isinstance(line, dict):
            raise UserError(f"{path}, line {number}: not a line of results, which is an object in braces")
        if "metric_value" in line and line["metric_value"] is None:
            line["metric_value"] = "nan"  # which JSON does not have
        if missing := [name for name in NEEDED if line.get(name) is None]:
            raise UserError(f"{path}, line {number}: a result lacks {', '.join(missing)}")
        yield _result(line, f"{path}, line {number}", line.get("network"), float)


def _read_csv(path: Path, content: str) -> Iterator[Result]:
    rows = csv.DictReader(content.splitlines())
    if missing := [name for name in NEEDED if name not in (rows.fieldnames or ())]:
        raise UserError(f"{path} lacks the column {', '.join(missing)}; a CSV of results has {', '.join(COLUMNS)}")
    strange: Counter[str] = Counter()
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        if lacking := [name for name in NEEDED if not row[name]]:
            raise UserError(f"{where}: a result lacks {', '.join(lacking)}")
        metric = _our_metric(row["metric"])
        if metric is None:
            strange[row["metric"]] += 1
            continue
        shots = row["shot"].removesuffix("_shot")
        if not (shots == "full" or shots.isdecimal() or is_share(shots)):
            raise UserError(f"{where}: shot is {row['shot']!r}; expected such as 10_shot, or full_shot")
        names = {
            "metric": metric,
            "shot": shots,
            "dataset": PUBLISHED_DATASETS.get(row["dataset"], row["dataset"]),
        }
        yield _result(row | names, where, row.get("network"), _percent)
    if strange:
        listed = ", ".join(f"{name} ({count:,})" for name, count in strange.items())
        print(
            f"warning: {path}: {strange.total():,} rows are left out, of metrics not known here: {listed}; "
            f"known are {', '.join(PUBLISHED_METRICS)}, and of single classes test/f1_0 and its like",
            file=sys.stderr,
        )


def _our_metric(name: str) -> str | None:
    """Our name of a metric of the published CSV; None for one that we do not know."""
    plain = name.removeprefix("test/")
    return PUBLISHED_METRICS.get(name) or (plain if plain != name and OF_A_CLASS.match(plain) else None)


def _result(line: Mapping[str, Any], where: str, network: str | None, percent: Callable[[Any], float]) -> Result:
    try:
        return Result(
            dataset=str(line["dataset"]),
            metric=str(line["metric"]),
            source=str(line["pretrained_model"]),
            network=network or network_of(str(line["pretrained_model"])),
            shots=str(line["shot"]),
            seed=int(line["seed"]),
            value=percent(line["metric_value"]),
            last_step=int(line["last_step"]) if line.get("last_step") not in (None, "") else None,
            path=str(line.get("path") or ""),
            interval=_interval(line.get("interval")),
            classes={
                str(name): math.nan if value is None else float(value)
                for name, value in dict(line.get("classes") or {}).items()
            },
            weights=str(line["weights"]) if line.get("weights") else None,
            majority=None if line.get("majority") in (None, "") else float(line["majority"]),
        )
    except (ValueError, TypeError, OverflowError, InvalidOperation) as error:
        raise UserError(f"{where}: a number is expected, but {error}") from error


def _interval(bounds: Any) -> tuple[float, float] | None:
    low, high = bounds or (None, None)
    return None if low is None or high is None else (float(low), float(high))


def _percent(text: str) -> float:
    """Percent of a fraction, without rounding on the way."""
    fraction = Decimal(text)
    if not (fraction.is_nan() or 0 <= fraction <= 1):
        raise ValueError(f"metric_value is {text}, not a fraction from 0 to 1")
    return float(fraction.scaleb(2))


def write_csv(results: Iterable[Result], path: str | Path) -> None:
    """Write results in the published columns and conventions; `read` gives the same results back.

    A ninth column, `network`, comes where a source's name does not say its network. UserError for a metric that the
    format does not have.
    """
    results = list(results)
    metrics = {ours: theirs for theirs, ours in PUBLISHED_METRICS.items()}
    datasets = {ours: theirs for theirs, ours in PUBLISHED_DATASETS.items()}
    metrics |= {result.metric: f"test/{result.metric}" for result in results if OF_A_CLASS.match(result.metric)}
    if unknown := {result.metric for result in results} - set(metrics):
        raise UserError(f"{path}: the published CSV has {' and '.join(metrics)} only, not {', '.join(sorted(unknown))}")
    more = ("network",) if any(result.network != network_of(result.source) for result in results) else ()
    with whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS + more)
        for result in results:
            row = (
                format(Decimal(repr(result.value)).scaleb(-2), "f"),
                metrics[result.metric],
                result.path,
                result.seed,
                f"{result.shots}_shot",
                result.source,
                datasets.get(result.dataset, result.dataset),
                "" if result.last_step is None else result.last_step,
            )
            table.writerow(row + ((result.network or "",) if more else ()))
