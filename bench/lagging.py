"""python -m bench.lagging: is a rank that lags named while the run goes on, and why? Trials with a known answer.

  python -m bench.lagging                                     40 trials of each kind on 4 ranks: half an hour
  python -m bench.lagging --trials 1 --ranks 2                in a minute

Ranks on this machine train for some seconds, one of them slowed in its input, its computing or its link, or none. A
step is that of one layer, and sleep with noise that a seed gives: so more ranks than cores do not disturb each
other. The slow reader sleeps longer, the slow computation too; the slow link delays what goes through it by its bytes.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.comm.mpirun import rank_command, rank_environment
from engine.whole import write_json
from loaders.arguments import COUNT, SEEDS, Number, as_path
from loaders.errors import UserError
from loaders.output import as_command

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 80, 10  # of a trial, and between logged ones
LONG, LONG_EVERY = 1200, 50  # of the run that says what watching costs: logged as by default


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m bench.lagging", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--trials", action=Number, within=COUNT, default=40, help="of each of four kinds (%(default)s)")
    add("--ranks", action=Number, within=(2, 64), default=4, help="(%(default)s)")
    add("--milliseconds", action=Number, within=(1, 10**4), default=40, help="of an undisturbed step (%(default)s)")
    add("--slower", action=Number, within=(0.01, 10.0), default=0.2, help="share of a step (%(default)s)")
    add("--seed", action=Number, within=SEEDS, default=0, help="of noise, order and ranks (%(default)s)")
    add("--out", type=as_path, metavar="FILE.json", help="write all of it")
    return result


def judged(trials: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By kind: how many trials were right, with 95% intervals, and after how many steps the rank was named.

    Right is a slowed trial that named the slowed rank for its reason and nobody else at any time; an undisturbed one
    that named nobody.
    """
    from scipy.stats import binomtest

    found = {}
    for kind in dict.fromkeys(trial["kind"] for trial in trials):
        own = [trial for trial in trials if trial["kind"] == kind]
        right = [trial for trial in own if _right(trial)]
        low, high = binomtest(len(right), len(own)).proportion_ci(0.95, method="exact")
        named = [trial["named"][0][0] for trial in right if trial["named"]]
        found[kind] = {"trials": len(own), "right": len(right), "share": len(right) / len(own), "low": low,
                       "high": high, "steps_until_named": statistics.median(named) if named else None}  # fmt: skip
    return found


def _right(trial: dict[str, Any]) -> bool:
    named = [(rank, reason) for _, rank, reason in trial["named"]]
    return named == ([] if trial["kind"] == "none" else [(trial["slow"], trial["kind"])])


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'slowed in':<10} {'right':>9} {'95% interval':>14} {'named after':>12}"]
    for kind, row in result["kinds"].items():
        after = "" if row["steps_until_named"] is None else f"{row['steps_until_named']:.0f} steps"
        rate = f"{row['right']} of {row['trials']}"
        lines.append(f"{kind:<10} {rate:>9} {row['low']:>7.0%} – {row['high']:.0%} {after:>12}")
    watching = result["watching_share"]
    return "\n".join([*lines, f"watching takes {watching['median']:.2%} of a step, {watching['high']:.2%} on one rank"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    try:
        options = parser().parse_args(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from bench.disturbed.lagging import MARK
    from bench.measured import timing  # brings torch, which --help need not wait for

    task = {"trials": options.trials, "step_s": options.milliseconds / 1e3, "slower": options.slower, "steps": STEPS,
            "every": EVERY, "long": LONG, "long_every": LONG_EVERY, "seed": options.seed}  # fmt: skip
    hardware = timing.hardware()  # with the load before ours
    words = [*rank_command(options.ranks, "torchrun"), "-m", "bench.disturbed.lagging", json.dumps(task)]
    env = rank_environment(options.ranks)
    done = subprocess.run(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, encoding="utf-8", errors="replace")
    said = [line.partition(MARK)[2] for line in done.stdout.splitlines() if MARK in line]
    if done.returncode or not said:
        print(f"error: the ranks ended with code {done.returncode}", file=sys.stderr)
        return 1
    found = json.loads(said[-1])
    milliseconds = timing.summarize([1e3 * trial["step_s"] for trial in found["trials"]])
    result = timing.record(
        "python -m bench.lagging " + " ".join(map(str, sys.argv[1:] if argv is None else argv)),
        {"step, all trials": milliseconds},
        supports="monitoring",
        spread="exact 95% interval of a share; 10th and 90th percentile of milliseconds",
        n=options.trials,
        simulated="sleep in the reader, in the forward pass and in the link, beside a real step of one layer",
        ranks=options.ranks,
        slower=options.slower,
        steps=STEPS,
        log_every=EVERY,
        kinds=judged(found["trials"]),
        watching_share={"median": statistics.median(found["watching"]), "high": max(found["watching"]),
                        "steps": LONG, "log_every": LONG_EVERY, "step_milliseconds": 1e3 * found["long_step_s"]},
        trials=found["trials"],
    )  # fmt: skip
    result["hardware"] = hardware
    print(table(result))
    if options.out:
        write_json(options.out, result)
    return 0


if __name__ == "__main__":
    as_command(main)
