"""`python -m bench.evaluate`: bootstrap intervals of predictions' scores beside a loop over scikit-learn, in one run.

  python -m bench.evaluate                                          25,596 images, 14 labels
  python -m bench.evaluate --images 1000 --resamples 100 --loop 1   in seconds

Predictions are made up: 14 labels, the rarest of 0.3% and the most frequent of 24% of the images, as findings in chest
X-rays are, or all of half (`--balanced`: the most work). Ours computes all seven scores of `engine.evaluate`; the loop
three, ROC AUC, average precision and Brier score, of a few resamples, and is reckoned up. Both are checked to agree.
`--json FILE` writes the record.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.whole import json_text
from loaders.arguments import COUNT, Number, as_place
from loaders.output import as_command

if TYPE_CHECKING:
    import numpy as np

    from engine.statistics.scores import Images

SHARES = (0.003, 0.24)
"""Of images that have the rarest and the most frequent label."""
THREE = ("auc", "average_precision", "brier")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m bench.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--images", action=Number, within=(100, 10**7), default=25_596, help="(%(default)s)")
    add("--labels", action=Number, within=(1, 10_000), default=14, help="(%(default)s)")
    add("--per-group", action=Number, within=(1, 10**6), default=1, help="images of each patient (%(default)s)")
    add("--balanced", action="store_true", help="half of the images have each label")
    add("--resamples", action=Number, within=COUNT, default=2000, help="(%(default)s)")
    add("--loop", action=Number, within=COUNT, default=4, help="resamples of the loop over scikit-learn (%(default)s)")
    add("--repeats", action=Number, within=COUNT, default=5, help="timed runs of each (%(default)s)")
    add("--json", type=as_place, nargs="?", const="-", metavar="FILE", help="write the record to FILE, or print it")
    return result


def made_up(images: int, labels: int, per_group: int, balanced: bool) -> Images:
    """Labels, and probabilities that have to do with them; the same in each run."""
    import numpy as np
    from scipy.special import expit, logit

    from engine.statistics.scores import Images

    random = np.random.default_rng(0)
    shares = np.full(labels, 0.5) if balanced else np.geomspace(*SHARES, labels)
    truth = (random.random((images, labels)) < shares).astype(np.float64)
    probabilities = expit(1.2 * truth + random.normal(size=truth.shape) + logit(shares))
    groups = np.arange(images) // per_group
    said = (probabilities >= shares).astype(np.float64)
    return Images(truth, probabilities, groups, int(groups[-1]) + 1, True, said)


def by_scikit_learn(images: Images, weights: np.ndarray) -> np.ndarray:
    """(3, labels, b) scores by a loop over (groups, b) weights and labels; NaN for a label of one value."""
    import numpy as np
    from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

    found = np.full((3, images.truth.shape[1], weights.shape[1]), np.nan)
    for column, times in enumerate(weights.T):
        rows = np.repeat(np.arange(len(images.groups)), times[images.groups].astype(np.int64))
        for label in range(images.truth.shape[1]):
            truth, scores = images.truth[rows, label], images.probabilities[rows, label]
            if 0 < truth.sum() < len(truth):
                found[:2, label, column] = roc_auc_score(truth, scores), average_precision_score(truth, scores)
            found[2, label, column] = brier_score_loss(truth, scores)
    return found


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The record, and what shows it to people."""
    import numpy as np

    from bench.measured import timing
    from engine.statistics import bootstrap
    from engine.statistics.scores import of_resamples, of_weights

    images = made_up(arguments.images, arguments.labels, arguments.per_group, arguments.balanced)
    few = next(bootstrap.resamples(images.count, arguments.loop, 0))
    mine = of_weights(images, few)
    off = np.nanmax(np.abs(np.stack([mine[name][:-1] for name in THREE]) - by_scikit_learn(images, few)))
    ours, loop = f"{arguments.resamples:,} resamples", f"scikit-learn, {few.shape[1]} resamples"
    times = timing.measure(
        {
            ours: lambda: of_resamples(images, arguments.resamples, 0),
            loop: lambda: by_scikit_learn(images, few),
        },
        repeats=arguments.repeats,
        warmup=1,
    )
    reckoned = times[loop].median * arguments.resamples / few.shape[1]
    given = ("images", "labels", "per_group", "resamples", "loop", "repeats")
    options = [f"--{name.replace('_', '-')} {getattr(arguments, name)}" for name in given]
    command = " ".join(["python -m bench.evaluate", *options, *(["--balanced"] * arguments.balanced)])
    record = timing.record(
        command,
        times,
        supports="evaluating",
        images=arguments.images,
        labels=arguments.labels,
        groups=images.count,
        balanced=arguments.balanced,
        resamples=arguments.resamples,
        ours_s=round(times[ours].median / 1e3, 3),
        scikit_learn_s=round(reckoned / 1e3, 1),
        times_as_fast=round(reckoned / times[ours].median, 1),
        largest_difference=float(off),
    )
    said = (
        f"{timing.table(times)}\n{ours}: {record['ours_s']:.2f} s; a loop over scikit-learn, reckoned up, "
        f"{record['scikit_learn_s']:,.0f} s: {record['times_as_fast']:.0f} times as long; largest difference "
        f"of a score {off:.1e}"
    )
    return record, said


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    arguments = parser().parse_args(argv)
    record, said = measure(arguments)
    text = json_text(record, indent=1)
    if arguments.json == "-":
        print(text)
        return
    print(said)
    if arguments.json is not None:
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    as_command(main)
