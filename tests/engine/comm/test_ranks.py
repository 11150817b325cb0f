"""What only several processes can show: collectives, equal training, failing together."""

import json
import re

import pytest
import torch

from engine.comm.choose import connect
from engine.comm.launch import Launch
from engine.network.weights import load
from engine.saving import checkpoint
from loaders.errors import UserError
from tests.conftest import ROOT

LAUNCHERS = {"mpirun": ("horovod", "MPI"), "horovodrun": ("horovod", "Gloo"), "torchrun": ("torch", "Gloo")}
RUN = ["-m", "engine.pretrain", "demo", "schedule.epochs=null", "schedule.steps=20", "schedule.warmup_steps=2",
       "train.log_every=1", "train.seed=5"]  # fmt: skip


def packs(digits):
    return [f"data.train={digits / 'low-train.h5'}", f"data.val={digits / 'low-test.h5'}"]


def events(folder, kind):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["kind"] == kind}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_collectives(launch, launcher):
    backend, transport = LAUNCHERS[launcher]
    done = launch(3, launcher, ["-m", "tests.support.rank_collectives", backend, "3"])
    assert done.returncode == 0, done.stderr
    for rank in range(3):
        assert f"rank {rank} of 3 agrees" in done.stdout
    assert transport in done.stdout


@pytest.fixture(scope="module")
def alone(launch, digits, tmp_path_factory):
    """The run on one rank, which the others must equal."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    done = launch(1, "torchrun", [*RUN, *packs(digits), f"folder={folder}"])
    assert done.returncode == 0, done.stderr
    assert "1 rank (local)" in done.stdout
    return folder


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_train_as_one_does(launch, launcher, digits, alone, tmp_path):
    """The same global batch: the same losses, scores and weights; gradients travel in several slices."""
    folder = tmp_path / "run"
    done = launch(2, launcher, [*RUN, *packs(digits), f"folder={folder}", "comm.slice_mib=0.02"])
    assert done.returncode == 0, done.stderr
    assert LAUNCHERS[launcher][1] in done.stdout
    times = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    assert len(times[0]["hosts"]) == 2
    assert {len(times[-1][name]) for name in ("input", "compute", "wait", "optimizer", "other")} == {2}
    expected, found = events(alone, "train"), events(folder, "train")
    assert list(found) == list(expected) == list(range(1, 21))
    for step, event in expected.items():
        assert found[step]["loss"] == pytest.approx(event["loss"], rel=1e-5), step
    last = events(folder, "val")[20]
    assert last["images"] == 270
    assert last["loss"] == pytest.approx(events(alone, "val")[20]["loss"], rel=1e-4)
    weights = load(checkpoint.find(folder) / checkpoint.WEIGHTS)
    for name, value in load(checkpoint.find(alone) / checkpoint.WEIGHTS).items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5, msg=name)


def broken(where, condition, error):
    """Words for `python` that run `-m WORDS` with a defect: `where` (module.Class.method) raises once `condition`."""
    module, kind, method = where.rsplit(".", 2)
    return [
        "-c",
        f"""
import runpy, sys
from {module} import {kind}
whole, calls = {kind}.{method}, []
def breaks(self, *rest, **named):
    calls.append(rest)
    if {condition}:
        raise {error}
    return whole(self, *rest, **named)
{kind}.{method} = breaks
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
""",
    ]


@pytest.mark.parametrize(("ranks", "more"), [(2, []), (3, ["train.micro_batch=16"])])
def test_a_run_goes_on_on_another_number_of_ranks(launch, digits, alone, tmp_path, ranks, more):
    """3 ranks share 4 micro-batches: one has two of them."""
    folder = tmp_path / "run"
    words = [*RUN[1:], *packs(digits), f"folder={folder}", "train.checkpoint_every=8", *more]
    breaks = broken("engine.training.hooks.Log.after_step", "len(calls) == 11", "OSError('node lost')")
    done = launch(ranks, "mpirun", [*breaks, *words])
    assert done.returncode != 0
    assert "node lost" in done.stderr
    assert checkpoint.find(folder).name < "step-00000011"
    done = launch(1, "torchrun", ["-m", *words])
    assert done.returncode == 0, done.stderr
    assert "goes on from" in done.stdout
    expected, found = events(alone, "train"), events(folder, "train")
    for step, event in expected.items():
        assert found[step]["loss"] == pytest.approx(event["loss"], rel=1e-5), step


def test_in_audit_mode_the_number_of_ranks_changes_no_bit(launch, digits, tmp_path):
    """1 rank to the end; 2 over torch.distributed and then 4 over Horovod, each broken off, and 1 for the rest."""
    audit = ["train.reproducible=true", "train.micro_batch=8", "train.checkpoint_every=3", "train.eval_every=0.2"]
    words = [*RUN, *packs(digits), *audit, "train.precision=bf16"]
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    done = launch(1, "torchrun", [*words, f"folder={one}"], threads=1)
    assert done.returncode == 0, done.stderr
    script = tmp_path / "breaks.py"  # torchrun takes no -c
    breaks = broken("engine.training.hooks.Log.after_step", "len(calls) == 8", "OSError('node lost')")[1]
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{breaks}", encoding="utf-8")
    for ranks, launcher in ((2, "torchrun"), (4, "mpirun")):
        done = launch(ranks, launcher, [script, *words[1:], f"folder={two}"], threads=1)
        assert "node lost" in done.stderr, done.stderr
    assert checkpoint.find(two).name == "step-00000012"
    done = launch(1, "torchrun", [*words, f"folder={two}"], threads=1)
    assert done.returncode == 0, done.stderr
    found, expected = (checkpoint.load(checkpoint.find(folder)) for folder in (two, one))
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(value, expected.weights[name]) for name, value in found.weights.items())
    momenta = zip(*(each.state["optimizer"]["state"].values() for each in (found, expected)), strict=True)
    assert all(torch.equal(a["momentum_buffer"], b["momentum_buffer"]) for a, b in momenta)
    for kind, keys in (("train", {"loss"}), ("val", {"loss", "top1", "images"})):
        scores = [{step: {key: event[key] for key in keys} for step, event in events(folder, kind).items()}
                  for folder in (two, one)]  # fmt: skip
        assert scores[0] == scores[1]
        assert len(scores[0]) > 5 if kind == "val" else list(scores[0]) == list(range(1, 21))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_bad_input_ends_all_ranks_with_one_message(launch, launcher, digits, tmp_path):
    (tmp_path / "short.h5").write_bytes((digits / "low-train.h5").read_bytes()[:-5000])
    done = launch(2, launcher, [*RUN, f"data.train={tmp_path / 'short.h5'}", f"folder={tmp_path / 'run'}"])
    assert done.returncode != 0
    assert done.stderr.count("error: ") + done.stdout.count("error: ") == 1
    assert "short.h5" in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()


def test_what_one_rank_alone_cannot_read_ends_all(launch, digits, tmp_path):
    good = [*RUN, *packs(digits), f"folder={tmp_path / 'run'}"]
    bad = [*good, f"data.train={tmp_path / 'absent.h5'}"]
    done = launch(2, "mpirun", good, bad, timeout=300)
    assert done.returncode == 2
    assert "absent.h5" in done.stderr
    assert "on rank 1 of 2" in done.stderr


def test_what_breaks_one_rank_alone_ends_all(launch, digits, tmp_path):
    """Rank 1 dies of a defect in the middle of training: rank 0 must not wait for it in an all-reduce."""
    good = [*RUN, *packs(digits), f"folder={tmp_path / 'run'}"]
    bad = broken("engine.optim.agc_sgd.AgcSgd.step", "len(calls) == 5", "ZeroDivisionError('a defect')")
    done = launch(2, "mpirun", good, [*bad, *good[1:]], timeout=300)
    assert done.returncode != 0
    assert "a defect" in done.stderr
    assert "[rank 1]" in done.stderr


# A second in which the heart beats: on a busy machine the steps before may have passed faster than it does.
STOPS, SLEEPS = "(__import__('time').sleep(1), os.kill(os.getpid(), 19))", "__import__('time').sleep(600)"


@pytest.mark.parametrize(
    ("launcher", "fault"), [("mpirun", STOPS), ("horovodrun", SLEEPS), ("torchrun", STOPS)], ids=list(LAUNCHERS)
)
def test_a_rank_that_hangs_ends_all(launch, launcher, fault, digits, tmp_path):
    """As an I/O error that never comes, or a node that is lost: the transport waits for ever, the watchdog does not."""
    ranks = "[os.environ.get(name) for name in ('OMPI_COMM_WORLD_RANK', 'HOROVOD_RANK', 'RANK')]"
    hangs = broken("engine.optim.agc_sgd.AgcSgd.step", f"len(calls) == 5 and '1' in {ranks} and {fault}", "OSError")
    folder, script = tmp_path / "run", tmp_path / "hangs.py"  # torchrun takes no -c
    script.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n{hangs[1]}", encoding="utf-8")
    done = launch(2, launcher, [script, *RUN[1:], *packs(digits), f"folder={folder}", "comm.timeout_s=6"])
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert re.search(r"rank 1 on \S+ \(process \d+\) is behind: (no sign of life, last heard of at )?step", said), said
    assert ("no sign of life" in said) == (fault == STOPS)
    assert "in fit" in (folder / "stuck" / "rank-00000.txt").read_text()
    assert (folder / "stuck" / "rank-00001.txt").exists() == (fault == SLEEPS)


@pytest.mark.parametrize("backend", ["auto", "local"])
def test_more_tasks_than_the_communicator_sees_is_refused(backend, monkeypatch):
    """As when srun starts 4 tasks without the MPI that Horovod knows: never 4 single runs in one folder."""
    if backend == "auto":
        pytest.importorskip("horovod.torch", reason="Horovod is not installed", exc_type=ImportError)
    with pytest.raises(UserError, match="Slurm started 4 tasks, but .* sees 1"):
        connect(backend, Launch("Slurm", 0, 4, 0))


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(launch, digits, alone, tmp_path):
    good = [*RUN, *packs(digits), f"folder={tmp_path / 'run'}"]
    told = broken(
        "engine.optim.agc_sgd.AgcSgd.step", "len(calls) == 6 and os.kill(os.getpid(), signal.SIGTERM)", "OSError"
    )
    done = launch(2, "mpirun", good, ["-c", "import os, signal\n" + told[1], *good[1:]])
    assert done.returncode == 75, done.stderr
    assert "stopped by SIGTERM" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoint.find(tmp_path / "run").name == "step-00000007"
    assert max(events(tmp_path / "run", "train")) == 7
    found = checkpoint.load(checkpoint.find(tmp_path / "run"))
    assert found.state["step"] == 7
