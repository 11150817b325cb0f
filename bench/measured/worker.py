"""One rank of a step that scaling_measure.py launches: trains, times, and rank 0 prints one line of JSON."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bench.measured import timing
from bench.measured.training import PHASES, Setup, TimedTrainer, agreement_loss, build, from_pack, synthetic
from engine.comm.choose import connect
from engine.comm.communicator import Communicator, SharedError
from engine.comm.device import choose_device
from loaders.errors import UserError, in_words
from loaders.output import as_command

MARK = "boosterbit-scaling "  # what the line of JSON begins with


def measure(
    trainer: TimedTrainer, source: Iterator, comm: Communicator, warmup: int, steps: int, repeats: int
) -> dict[str, Any]:
    """Images/s over all ranks in each repeat, each rank's step times, and shares of the phases."""
    trainer.run(source, warmup)
    rates, times, sums = [], [], dict.fromkeys(PHASES, 0.0)
    for _ in range(repeats):
        comm.sum_(torch.zeros(1), "together")  # all start at once
        trainer.watch.restart()
        trainer.run(source, steps)
        taken, laps = trainer.watch.seconds()
        slowest = max(comm.exchange(sum(taken)))
        rates.append(steps * trainer.global_batch / slowest)
        times.extend(taken)
        for name, value in laps.items():
            sums[name] += value
    milliseconds = np.percentile(np.array(times) * 1e3, [50, 90, 99]).tolist()
    ranks = comm.exchange((milliseconds, sums))
    total = sum(sum(parts.values()) for _, parts in ranks)
    return {
        "images_per_second": statistics.median(rates),
        "images_per_second_low": min(rates),
        "images_per_second_high": max(rates),
        "repeats": repeats,
        "step_milliseconds_per_rank": [dict(zip(("p50", "p90", "p99"), found, strict=True)) for found, _ in ranks],
        "share_percent": {name: 100 * sum(parts[name] for _, parts in ranks) / total for name in PHASES},
    }


def work(task: dict[str, Any], comm: Communicator) -> dict[str, Any]:
    """What one size gives. UserErrors come together on all ranks."""
    setup = Setup(**task["setup"])
    with comm.together():
        device = choose_device(setup.device, comm)
        loaded = None if task["data"] is None else from_pack(task["data"], setup, comm, device)
    trainer = build(setup, comm)
    how = {name: task[name] for name in ("warmup", "steps", "repeats")}
    result: dict[str, Any] = {"synthetic": measure(trainer, synthetic(setup, comm, device), comm, **how)}
    if loaded is not None:
        result["with_input"] = measure(trainer, loaded, comm, **how)
        loaded.close()
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    hosts = comm.exchange(platform.node())
    result |= {
        "ranks": comm.size,
        "communicator": comm.name,
        "hosts": sorted(set(hosts)),
        "hardware": timing.hardware(device),
        "versions": timing.versions(),
        "optimizer": trainer.optimizer.implementation,
        "peak_gpu_gib": peak,
    }
    del trainer
    if task["agreement_batch"]:
        result["losses"] = agreement_loss(setup, comm, task["agreement_batch"], task["agreement_steps"])
    return result


def main() -> None:
    """The command line: one argument, the task as JSON."""
    task = json.loads(sys.argv[1])
    try:
        comm = connect(task["backend"])
    except UserError as error:
        print(f"error: {in_words(error)}", file=sys.stderr, flush=True)
        sys.exit(2)
    try:
        result = work(task, comm)
    except SharedError as error:
        if comm.leads:
            print(f"error: {in_words(error)}", file=sys.stderr, flush=True)
        comm.close()
        sys.exit(2)
    except (UserError, OSError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr, flush=True)
        comm.abort(2)
    except Exception:  # of one rank alone, such as memory that runs out: the others must not wait for it
        traceback.print_exc()
        comm.abort(1)
    if comm.leads:
        print(MARK + json.dumps(result), flush=True)
    comm.close()


if __name__ == "__main__":
    as_command(main)
