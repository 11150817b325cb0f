"""SIGKILL at any moment, of a run that saves in each step or of one on 1 and 2 ranks by turns: is anything lost?

    python -m tests.fuzz.kills --what saving --kills 50 --json docs/results/kills-saving.json
    python -m tests.fuzz.kills --what training --kills 20 --json docs/results/kills-training.json

saving: `train.keep=1`, a checkpoint in each step; kills count that left a checkpoint half written. training: audit
mode, a checkpoint every 10 steps; the whole job is killed, or one of two ranks, and the launcher ends the other.

After each kill a sound checkpoint must be there, of a step no older than the newest one before it, and nobody has to
clear anything away for the next start to go on from it. In the end weights, momentum and logged losses must be those of
a run on one rank that nothing happened to.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.comm.mpirun import rank_command
from engine.config.loading import load
from engine.config.schema import PretrainConfig
from engine.saving import checkpoint, places
from tests.conftest import ROOT
from tests.support.outcomes import commit, peak_mib, record

LONGEST_S = 600  # for a run to begin to save, to end after a kill, or to end by itself
SETTINGS = {
    "saving": ["train.checkpoint_every=1", "train.keep=1", "data.val=null"],
    "training": ["train.checkpoint_every=10", "train.reproducible=true", "train.micro_batch=8"],
}


def packs(place):
    """Settings that name packs of real digits, which are made in the folder `place`."""
    for part in ("train", "test"):
        words = ["sklearn:digits", place / f"{part}.h5", "--part", part, "--holdout", "0.3", "--workers", "1"]
        subprocess.run([sys.executable, "-m", "loaders.pack", *words], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return [f"data.train={place / 'train.h5'}", f"data.val={place / 'test.h5'}"]


def settings(what, found, folder, steps):
    """Key=value words of a run."""
    schedule = ["schedule.kind=constant", "schedule.epochs=null", "schedule.warmup_steps=1", f"schedule.steps={steps}"]
    return [*found, f"folder={folder}", "train.log_every=1", "comm.timeout_s=60", *schedule, *SETTINGS[what]]


def forked(words):
    """A run on one rank, in a copy of this process, which has all modules: it begins at once. Its process number."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        from engine import pretrain

        pretrain.pretrain(load(PretrainConfig, "demo", words, "pretrain"), Communicator(Launch("alone")))
        code = 0
    finally:
        os._exit(code)


def launched(words, ranks):
    """A run on so many ranks, by Horovod or torch.distributed, whichever is there. Its process number."""
    command = [sys.executable] if ranks == 1 else rank_command(ranks)
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    words = [*command, "-m", "engine.pretrain", "demo", *words]
    return subprocess.Popen(words, cwd=ROOT, env=env, start_new_session=True, **quiet).pid


def ended(number):
    """The exit status of a process, once it has ended; an error where that takes too long."""
    until = time.monotonic() + LONGEST_S
    while time.monotonic() < until:
        found, status = os.waitpid(number, os.WNOHANG)
        if found:
            return status
        time.sleep(0.01)
    kill_all(number)
    raise TimeoutError(f"a process has not ended within {LONGEST_S} s: it hangs")


def kill_all(number):
    """End whatever is left of a job."""
    for process in members(number):
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            os.kill(process, signal.SIGKILL)


def newest(folder):
    """The step of the newest checkpoint, -1 where there is none."""
    found = places.complete(folder / "checkpoints")
    return int(found[-1].name[5:]) if found else -1


def saves(number, folder, than):
    """Wait until a run has saved a step after `than`."""
    until = time.monotonic() + LONGEST_S
    while newest(folder) <= than:
        if os.waitpid(number, os.WNOHANG)[0]:
            raise ChildProcessError("a run ended before it saved anything")
        if time.monotonic() > until:
            kill_all(number)
            raise TimeoutError(f"a run has saved nothing for {LONGEST_S} s: it hangs")
        time.sleep(0.002)


def members(number):
    """Process → words of all that live in the session that `number` began: launcher and ranks."""
    words = ["ps", "-e", "-o", "pid=,sid=,stat=,args="]
    lines = [line.split(maxsplit=3) for line in subprocess.check_output(words, text=True).splitlines()]
    return {int(pid): said for pid, session, state, said in lines if int(session) == number and state[0] != "Z"}


def kill(number, random, one_rank):
    """End a job, or one of its ranks, whose launcher then has to end the others; what was done."""
    there = members(number)
    ranks = [pid for pid, words in there.items() if "mpirun" not in words and "torchrun" not in words]
    if one_rank:
        os.kill(ranks[int(random.integers(len(ranks)))], signal.SIGKILL)
    else:
        kill_all(number)
    assert ended(number) != 0, "a job that was killed ended as if all were well"
    until = time.monotonic() + LONGEST_S
    while left := members(number):
        assert time.monotonic() < until, f"these outlive their job: {left}"
        time.sleep(0.05)
    return "one rank of two" if one_rank else "the whole job"


def sound(folder, than):
    """Whether a half-written checkpoint lies there; an error unless the newest is sound and of step `than` or later."""
    place = folder / "checkpoints"
    newest_about = checkpoint.describe(places.complete(place)[-1])
    found, damaged = checkpoint.newest_sound(place, newest_about)
    assert not damaged, f"damaged after a kill: {damaged}"
    assert found.state["step"] >= than, f"step {than} was saved, and {found.state['step']} is what is left"
    return any(path.name.startswith(".") for path in place.iterdir())


def losses(folder):
    """Step → logged loss: of a step that was trained again, the last one."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return {event["step"]: event["loss"] for event in events if event["kind"] == "train"}


def state(folder):
    """Weights and momentum, in order, and the losses."""
    found = checkpoint.load(checkpoint.find(folder))
    momenta = [each["momentum_buffer"] for each in found.state["optimizer"]["state"].values()]
    return [*found.weights.values(), *momenta], losses(folder)


def run(what, kills, seed, place):
    """Kill, go on, and compare; counts of what was done."""
    random, found, folder = np.random.default_rng(seed), packs(place), place / "killed"
    done, lives = Counter(), 0
    while sum(done.values()) < kills:
        before, ranks = newest(folder), 1 + lives % 2
        words = settings(what, found, folder, 10**6)
        number = forked(words) if what == "saving" else launched(words, ranks)
        saves(number, folder, before)
        time.sleep(random.exponential(0.1 if what == "saving" else 0.5))
        reached = newest(folder)
        said = kill(number, random, one_rank=what == "training" and ranks == 2 and lives % 4 == 1)
        half = sound(folder, reached)
        lives += 1
        if what == "training" or half:
            done[said if what == "training" else "in saving"] += 1
        print(f"{lives} runs, step {newest(folder)}: {dict(done)}", file=sys.stderr, flush=True)
    last = newest(folder) + 20
    for whole in (folder, place / "undisturbed"):
        words = settings(what, found, whole, last)
        assert ended(forked(words) if what == "saving" else launched(words, 1)) == 0, "a run did not end by itself"
    (mine, mine_losses), (theirs, their_losses) = state(folder), state(place / "undisturbed")
    same = len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))
    other = sum(mine_losses[step] != loss for step, loss in their_losses.items())
    return {"kills": dict(done), "runs": lives, "last_step": last, "same_bits": same, "steps_with_another_loss": other}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=SETTINGS, default="saving")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begun_at = commit()
    with tempfile.TemporaryDirectory() as place:
        found = run(arguments.what, arguments.kills, arguments.seed, Path(place))
    record(arguments.json, begun_at, arguments.kills, arguments.seed, **found, lost=0, most_mib=peak_mib())


if __name__ == "__main__":
    main()
