"""The measuring side of scaling.py: launches a step of each size, and makes one table of what they say."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.measured import steps, timing
from bench.measured.training import Setup
from bench.measured.worker import MARK
from bench.model import report as scaling_report
from bench.model.facts import number
from bench.model.page import scaling_page
from bench.model.report import Row
from engine.comm.launch import detect_launch
from engine.comm.mpirun import waiting
from engine.whole import write_json
from loaders.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
AGREEMENT_STEPS = 5
AGREES = {"fp32": 1e-4, "tf32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}  # relative difference of losses between sizes
MOST_SHARED_IMAGES = 4096  # of the batch that all sizes train on to compare losses


def run(arguments: argparse.Namespace) -> None:
    """Measure 1, 4, 8, …, N ranks, print the table, write what was asked for."""
    if detect_launch().rank != 0:
        return  # the first task launches the steps; the others only kept the places
    setup = _setup(arguments)
    sizes = sweep_sizes(arguments.gpus)
    shared = 0 if setup.reproducible else agreement_batch(sizes)
    task = {
        "setup": asdict(setup),
        "data": None if arguments.data == "synthetic" else str(Path(arguments.data).resolve()),
        "backend": arguments.backend,
        "warmup": arguments.warmup,
        "steps": arguments.steps,
        "repeats": arguments.repeats,
        "agreement_batch": shared,
        "agreement_steps": AGREEMENT_STEPS,
    }
    env = steps.environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if "SLURM_JOB_ID" not in env:
        env |= waiting(arguments.gpus)
    # Ranks of all sizes get as many threads, or one rank would have all cores and many would have to share them.
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // arguments.gpus)))
    results = {}
    for ranks in sizes:
        print(f"measuring {ranks} rank{'s' if ranks > 1 else ''} …", file=sys.stderr, flush=True)
        results[ranks] = launch(ranks, task, env)
    report(arguments, setup, results, env)


def sweep_sizes(ranks: int) -> list[int]:
    """1, 4, 8, … and `ranks`; 2 as well where no more than 4 are asked for."""
    found = {1, ranks} | {size for size in (2**k for k in range(2, 20)) if size < ranks}
    return sorted(found | ({2} if 2 < ranks <= 4 else set()))


def agreement_batch(sizes: list[int]) -> int:
    """Images that every size can share out evenly; 0 where that would be too many."""
    shared = math.lcm(*sizes)
    return 0 if shared > MOST_SHARED_IMAGES else shared * max(1, 8 // shared)


def launch(ranks: int, task: dict[str, Any], env: dict[str, str]) -> dict[str, Any]:
    """What a step of `ranks` ranks found. UserError where it failed."""
    words = [*steps.command(ranks), "-m", "bench.measured.worker", json.dumps(task)]
    done = subprocess.run(words, cwd=ROOT, env=env, encoding="utf-8", errors="replace", capture_output=True)
    lines = [line.partition(MARK)[2] for line in done.stdout.splitlines() if MARK in line]
    if done.returncode or not lines:
        said = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-15:])
        raise UserError(f"the step of {ranks} ranks ended with {done.returncode}: {shlex.join(words[:-1])}\n{said}")
    return json.loads(lines[-1])


def report(
    arguments: argparse.Namespace, setup: Setup, results: dict[int, dict[str, Any]], env: dict[str, str]
) -> None:
    """Print the table; write JSON and figure."""
    rows, agree = measured_rows(results), losses_agree(results, setup.precision)
    one = next(iter(results.values()))
    kind = "with_input" if "with_input" in one else "synthetic"
    last = results[max(results)]
    print(
        f"measured: {setup.network}, {setup.size} px, {setup.batch} images a rank, {setup.precision}, "
        f"{last['communicator']}; {last['hardware'].get('gpu', last['hardware']['cpu'])}, "
        f"{len(last['hosts'])} host(s), load before {one['hardware']['load_before']}\n"
        f"median of {arguments.repeats} repeats of {arguments.steps} steps after {arguments.warmup}\n"
    )
    print(scaling_report.table(rows))
    print(details(results, kind))
    print(f"\nlosses over {AGREEMENT_STEPS} steps on the same images: {agree}")
    if arguments.json:
        content = {
            "rows": [row.as_json() for row in rows],
            "hardware": last["hardware"] | {"hosts": last["hosts"]},
            "profile": asdict(setup) | {"optimizer": last["optimizer"]},
            "versions": last["versions"],
            "commit": timing.commit(),
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "bench/scaling.py", *sys.argv[1:]]),
            "launched_by": shlex.join(steps.command(max(results))[:-1]).replace(
                str(Path(sys.executable).parent) + "/", ""
            ),
            "omp_num_threads": env["OMP_NUM_THREADS"],
            "losses_agree": agree,
            "n": arguments.repeats,
            "spread": "lowest and highest of the repeats",
            "supports": ["scaling", "training"],
        }
        write_json(arguments.json, content)
    if arguments.plot:
        title = f"{setup.network}, {setup.batch} images a rank, {setup.precision}: measured"
        scaling_report.figure(rows, None, arguments.plot, title)
    if arguments.page:
        facts = {"command": shlex.join(["python", "bench/scaling.py", *sys.argv[1:]]), "commit": timing.commit() or "–",
                 "network": f"{setup.network}, {setup.size} px, {setup.batch} images a rank, {setup.precision}",
                 "hardware": ", ".join(f"{key} {value}" for key, value in last["hardware"].items()),
                 "versions": ", ".join(f"{key} {value}" for key, value in last["versions"].items()),
                 "repeats": f"median of {arguments.repeats} of {arguments.steps} steps", "losses": agree}  # fmt: skip
        size = scaling_page(rows, None, arguments.page, f"{setup.network}: measured", facts)
        print(f"\npage: {arguments.page} ({size / 1e3:,.0f} kB)")
    if agree.startswith("differ"):
        raise UserError(f"losses {agree}: the sizes do not train the same network, and the table means nothing")


def measured_rows(results: dict[int, dict[str, Any]]) -> list[Row]:
    """Rows with input where it was measured, else without; the first is the one that speedups refer to."""
    rates = {
        ranks: found.get("with_input", found["synthetic"])["images_per_second"] for ranks, found in results.items()
    }
    one = rates[1]
    rows = []
    for ranks, found in results.items():
        more = {key: value for key, value in found.items() if key not in ("hardware", "versions", "hosts", "ranks")}
        rows.append(
            Row(ranks, rates[ranks], rates[ranks] / one, 100 * rates[ranks] / one / ranks, "measured",
                more | {"hosts": len(found["hosts"])})
        )  # fmt: skip
    return rows


def details(results: dict[int, dict[str, Any]], kind: str) -> str:
    """Spread, step times and shares of each size, for people."""
    head = f"\n{'ranks':>6} {'without input: low…high':>26} {'with input: low…high':>26} {'step ms p50':>12} {'p99':>8}"
    lines = [head + "   data forward backward exposed optimizer, % of the step"]
    for ranks, found in results.items():
        shares = found[kind]["share_percent"]
        times = found[kind]["step_milliseconds_per_rank"]
        lines.append(
            f"{ranks:6} {_spread(found['synthetic']):>26} {_spread(found.get('with_input')):>26} "
            f"{max(rank['p50'] for rank in times):12.1f} {max(rank['p99'] for rank in times):8.1f}   "
            f"{shares['data']:4.1f} {shares['forward']:7.1f} {shares['backward']:8.1f} {shares['exposed']:7.1f} "
            f"{shares['optimizer']:9.1f}"
        )
    return "\n".join(lines)


def losses_agree(results: dict[int, dict[str, Any]], precision: str) -> str:
    """Whether all sizes had the losses of the smallest, in words."""
    series = {ranks: found["losses"] for ranks, found in results.items() if "losses" in found}
    if len(series) < 2:
        return "not compared: fewer than two sizes share a batch"
    first = next(iter(series.values()))
    worst = max(abs(a - b) / abs(a) for found in series.values() for a, b in zip(first, found, strict=True))
    verdict = "agree" if worst <= AGREES[precision] else "differ"
    return f"{verdict}: largest relative difference {worst:.1e}, allowed {AGREES[precision]:.0e}"


def _spread(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    middle, low, high = (found[f"images_per_second{end}"] for end in ("", "_low", "_high"))
    return f"{middle:,.1f} ({low:,.1f}…{high:,.1f})"


def _setup(arguments: argparse.Namespace) -> Setup:
    for name in ("warmup", "steps", "repeats"):
        number(getattr(arguments, name), f"--{name}", zero=name == "warmup", whole=True)
    gpu = torch.cuda.is_available() and arguments.device != "cpu"
    return Setup(
        network=arguments.model,
        batch=number(32 if arguments.batch is None else arguments.batch, "--batch", zero=False, whole=True),
        precision=arguments.precision or ("bf16" if gpu else "fp32"),
        device=arguments.device,
        size=number(arguments.size, "--size", zero=False, whole=True),
        slice_mib=number(
            32.0 if arguments.slice_mib is None else arguments.slice_mib, "--slice-mib", zero=False, whole=False
        ),
        reproducible=arguments.reproducible,
    )
