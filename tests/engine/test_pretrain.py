import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import h5py
import pytest
import torch

from engine import pretrain
from engine.comm.communicator import Communicator, SharedError, Stopped
from engine.comm.launch import Launch
from engine.config.loading import load
from engine.config.schema import PretrainConfig
from engine.network import bit
from engine.network.weights import load as load_weights
from engine.optim import AgcSgd
from engine.saving import checkpoint, places, signals
from engine.training import hooks
from engine.training.assemble import read_weights
from engine.training.hooks import Evaluate
from engine.training.trainer import Trainer
from loaders.packs.shard import Pack

STEPS = ["schedule.epochs=null", "schedule.steps=12", "schedule.warmup_steps=2", "train.log_every=1"]


def settings(digits, folder, *more):
    packs = [f"data.train={digits / 'low-train.h5'}", f"data.val={digits / 'low-test.h5'}", f"folder={folder}"]
    return [*packs, *STEPS, *more]


def run(digits, folder, *more):
    config = load(PretrainConfig, "demo", settings(digits, folder, *more), "pretrain")
    pretrain.pretrain(config, Communicator(Launch("alone")))


def newest(folder):
    return load_weights(checkpoint.find(folder) / checkpoint.WEIGHTS)


def losses(folder):
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {event["step"]: event["loss"] for event in events if event["kind"] == "train"}


def test_a_run_leaves_what_it_promises(digits, tmp_path, capsys):
    run(digits, tmp_path / "run")
    out = capsys.readouterr().out
    assert "29,845 parameters, 5 classes" in out
    assert "finished" in out
    folder = tmp_path / "run"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    assert list(losses(folder)) == list(range(1, 13))
    surroundings = json.loads((folder / "environment.json").read_text())
    assert surroundings["versions"]["torch"] == torch.__version__
    about = checkpoint.describe(checkpoint.find(folder))
    assert about["class_names"] == ["0", "1", "2", "3", "4"]
    assert (about["step"], about["images"]) == (12, 12 * 64)
    assert load(PretrainConfig, str(folder / "config.yaml"), [], "pretrain").schedule.steps == 12
    bit.build("R8x0.25-8px", 5).load_state_dict(newest(folder))


@pytest.mark.parametrize("network_settings", [[], ["train.accumulate=2", "data.backend=host"]])
def test_a_run_that_breaks_off_goes_on_as_if_it_never_had(digits, tmp_path, monkeypatch, network_settings):
    more = ["train.checkpoint_every=4", *network_settings]
    run(digits, tmp_path / "whole", *more)
    step = Trainer.train_step

    def breaks(self, micro_batches):
        if self.step == 7:
            raise OSError("node lost")
        step(self, micro_batches)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", breaks)
        with pytest.raises(OSError, match="node lost"):
            run(digits, tmp_path / "broken", *more)
    assert checkpoint.find(tmp_path / "broken").name == "step-00000004"
    run(digits, tmp_path / "broken", *more)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    expected = newest(tmp_path / "whole")
    for name, value in newest(tmp_path / "broken").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("stops", [(12,), (8, 12), (2, 4, 6, 8, 10, 12)])
def test_the_checkpoint_with_the_least_validation_loss_is_kept_across_resuming(digits, tmp_path, monkeypatch, stops):
    """Losses are made up, so that the least one is in the middle, and a NaN and a tie are among them."""
    said = {2: 3.0, 4: math.nan, 6: 1.0, 8: 1.0, 10: 2.0, 12: 1.5}
    monkeypatch.setattr(
        Evaluate, "evaluate", lambda self, trainer: setattr(self, "newest", {"loss": said[trainer.step]})
    )
    every = 2 * 64 / len(Pack.open(digits / "low-train.h5"))
    kept = {}
    for last in stops:
        more = ["train.keep_best=true", f"train.eval_every={every}", f"schedule.steps={last}"]
        run(digits, tmp_path / "run", *more, "schedule.milestones=[]", "train.checkpoint_every=2", "train.keep=9")
        (best,) = places.complete(tmp_path / "run" / "best")
        kept[last] = checkpoint.describe(best)
        assert kept[last]["step"] == (2 if last < 6 else 6)
    assert (kept[12]["val_loss"], kept[12]["images"]) == (1.0, 6 * 64)
    same = load_weights(tmp_path / "run" / "checkpoints" / "step-00000006" / checkpoint.WEIGHTS)
    transferred, about, _ = read_weights(tmp_path / "run" / "best")
    assert about["step"] == 6
    assert all(torch.equal(transferred[name], value) for name, value in same.items())
    assert any(not torch.equal(transferred[name], value) for name, value in newest(tmp_path / "run").items())


def test_the_best_checkpoint_is_that_of_the_least_logged_loss_and_none_without_validation(digits, tmp_path):
    run(digits, tmp_path / "run", "train.keep_best=true", "train.eval_every=0.1")
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    least = min((event for event in events if event["kind"] == "val"), key=lambda event: event["loss"])
    about = checkpoint.describe(checkpoint.find(tmp_path / "run" / "best"))
    assert (about["step"], about["val_loss"]) == (least["step"], least["loss"])
    run(digits, tmp_path / "blind", "train.keep_best=true", "data.val=null")
    assert not (tmp_path / "blind" / "best").exists()


def test_a_killed_process_leaves_a_checkpoint_to_go_on_from(digits, tmp_path):
    more = ["schedule.steps=100000", "train.checkpoint_every=3"]
    command = [sys.executable, "-m", "engine.pretrain", "demo", *settings(digits, tmp_path / "run"), *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "run" / "checkpoints"
    until = time.monotonic() + 300
    while len(places.complete(checkpoints)) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    found = checkpoint.load(checkpoint.find(tmp_path / "run"))
    assert found.state["step"] % 3 == 0
    last = found.state["step"] + 2
    run(digits, tmp_path / "run", f"schedule.steps={last}", "schedule.warmup_steps=1")
    assert checkpoint.find(tmp_path / "run").name == f"step-{last:08d}"


def test_a_finished_run_again_changes_nothing(digits, tmp_path, capsys):
    run(digits, tmp_path / "run")
    before = newest(tmp_path / "run")
    run(digits, tmp_path / "run")
    assert "step 12 of 12" in capsys.readouterr().out
    after = newest(tmp_path / "run")
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_a_dry_run_too_refuses_ranks_that_share_a_gpu(digits, tmp_path, monkeypatch):
    """What the first hour on a cluster looks for by a dry run."""
    asked = []
    monkeypatch.setattr("engine.training.run.refuse_shared_gpus", lambda device, comm: asked.append(device.type))
    pretrain_main(["demo", "--dry-run", *settings(digits, tmp_path / "run")], 0)
    assert asked == ["cpu"]


def test_a_dry_run_shows_the_schedule_and_writes_nothing(digits, tmp_path, capsys):
    pretrain_main(["demo", "--dry-run", *settings(digits, tmp_path / "run")], 0)
    out = capsys.readouterr().out
    assert "(64, 3, 8, 8)" in out
    assert "MiB an image kept for the backward pass" in out
    assert "peak memory" in out
    assert "GFLOP" in out
    rates = [float(rate) for rate in re.findall(r"learning rate (\S+)", out)]
    assert max(rates) == pytest.approx(0.1)  # base_lr at base_batch 64
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["--list"], ["imagenet21k_r152x4", "--print-config", "data.train=a.h5"]])
def test_what_only_informs_needs_no_data(arguments, capsys):
    pretrain.main(arguments)
    assert "imagenet21k_r152x4" in capsys.readouterr().out


def pretrain_main(arguments, code):
    with pytest.raises(SystemExit) as ended:
        pretrain.main(arguments)
    assert ended.value.code == code


def bad_pack(digits, tmp_path, what):
    """The packs and settings of a bad input, and what the message must say."""
    train, folder = digits / "low-train.h5", tmp_path / "run"
    if what == "missing":
        return [f"data.train={tmp_path / 'absent.h5'}"], "absent.h5"
    if what == "empty folder":
        (tmp_path / "empty").mkdir()
        return [f"data.train={tmp_path / 'empty'}"], "empty"
    if what == "truncated":
        (tmp_path / "short.h5").write_bytes(train.read_bytes()[:-5000])
        return [f"data.train={tmp_path / 'short.h5'}"], "short.h5"
    if what == "foreign":
        with h5py.File(tmp_path / "foreign.h5", "w") as file:
            file["images"] = [1, 2, 3]
        return [f"data.train={tmp_path / 'foreign.h5'}"], "foreign.h5"
    if what == "not HDF5":
        (tmp_path / "text.h5").write_text("hello")
        return [f"data.train={tmp_path / 'text.h5'}"], "text.h5"
    if what == "labels exceed the head":
        return ["model.num_classes=3"], "label 4"
    if what == "classes differ":
        return [f"data.val={digits / 'high-test.h5'}"], "classes"
    if what == "validation on what is trained on":
        return [f"data.val={train}"], "images of data.val are in data.train too"
    if what == "unknown key":
        return ["optim.base_rl=1"], "optim.base_lr"
    if what == "unknown network":
        return ["model.name=R50x2"], "R50x"
    if what == "batch does not divide":
        return ["train.global_batch=65", "train.accumulate=2"], "65"
    if what == "warm-up longer than the run":
        return ["schedule.warmup_steps=13"], "warm"
    if what == "another run's folder":
        run(digits, folder)
        return ["train.global_batch=32"], "another run"
    raise AssertionError(what)


@pytest.mark.parametrize(
    "what",
    ["missing", "empty folder", "truncated", "foreign", "not HDF5", "labels exceed the head", "classes differ",
     "validation on what is trained on", "unknown key", "unknown network", "batch does not divide",
     "warm-up longer than the run",
     "another run's folder"],
)  # fmt: skip
def test_bad_input_ends_in_one_message(digits, tmp_path, capsys, what):
    more, said = bad_pack(digits, tmp_path, what)
    existed = (tmp_path / "run").exists()
    capsys.readouterr()
    pretrain_main(["demo", *settings(digits, tmp_path / "run", *more)], 2)
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert said in message
    assert "Traceback" not in message
    assert (tmp_path / "run").exists() == existed


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_ends_a_run_with_a_checkpoint(digits, tmp_path, monkeypatch, number):
    """As a scheduler sends it, or Ctrl-C: the run stops at the next step, and goes on as if it never had."""
    run(digits, tmp_path / "whole", "schedule.steps=30")
    step = Trainer.train_step

    def interrupted(self, micro_batches):
        if self.step == 7:
            os.kill(os.getpid(), number)
        step(self, micro_batches)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", interrupted)
        signals.listen()
        with pytest.raises(Stopped, match=f"stopped by {number.name} at step 9 of 30") as stopped:
            run(digits, tmp_path / "stopped", "schedule.steps=30")
    assert stopped.value.exit_code == 75
    assert checkpoint.find(tmp_path / "stopped").name == "step-00000009"
    signals.listen()
    run(digits, tmp_path / "stopped", "schedule.steps=30")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    expected = newest(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in newest(tmp_path / "stopped").items())


def test_two_runs_in_one_folder(digits, tmp_path, monkeypatch):
    """The second is told, and nothing of the first's is touched; what has taken the place ends the first."""
    folder, save = tmp_path / "run", hooks.SaveCheckpoints.save

    def second(self, trainer, **how):
        (folder / "checkpoints" / ".step-00000099.writing").mkdir(parents=True)
        with pytest.raises(SharedError, match=f"{folder} is in use since .* choose another folder=…"):
            run(digits, folder)
        assert (folder / "checkpoints" / ".step-00000099.writing").exists()
        monkeypatch.setattr(hooks.SaveCheckpoints, "save", save)
        save(self, trainer, **how)
        (folder / "lock").write_text("another's")

    monkeypatch.setattr(hooks.SaveCheckpoints, "save", second)
    with pytest.raises(SharedError, match="is another run's now"):
        run(digits, folder, "train.checkpoint_every=4")
    assert checkpoint.find(folder).name == "step-00000004"
    (folder / "lock").unlink()
    run(digits, folder, "train.checkpoint_every=4")
    assert not (folder / "lock").exists()


DURING_IMPORTS = """
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and not told:
            told.append(os.kill(os.getpid(), signal.SIGTERM))
told = []
sys.meta_path.insert(0, Finder())
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def test_a_signal_during_the_imports_ends_a_run_before_its_first_step(digits, tmp_path):
    words = ["-c", DURING_IMPORTS, "engine.pretrain", "demo", *settings(digits, tmp_path / "run")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 75, done.stderr
    assert "stopped by SIGTERM before the first step" in done.stderr
    assert not (tmp_path / "run").exists()


def poison(trainer, place, value):
    """Put one number that is none into the weights or the momentum."""
    buffer = next(iter(trainer.optimizer.state.values()))["momentum_buffer"]
    (trainer.flat.values if place == "weights" else buffer)[(0,) * (1 if place == "weights" else buffer.ndim)] = value


@pytest.mark.parametrize(("place", "value"), [("weights", float("nan")), ("weights", float("-inf")),
                                              ("momentum", float("nan")), ("momentum", float("inf"))])  # fmt: skip
def test_a_checkpoint_is_finite_or_is_not_written(digits, tmp_path, monkeypatch, place, value):
    """The good ones stay, and the run goes on from them; what it came to lies beside, with the samples of the step."""
    more = ["schedule.steps=14", "train.checkpoint_every=4", "train.log_every=100", "train.eval_every=100"]
    step, seen = Trainer.train_step, []

    def diverges(self, micro_batches):
        step(self, micro_batches)
        seen[:] = [batch.ids.tolist() for batch in micro_batches]
        if self.step == 12:
            poison(self, place, value)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", diverges)
        with pytest.raises(SharedError, match=r"not finite at step 12 .*step-00000010 is kept.*diverged-00000012"):
            run(digits, tmp_path / "run", *more)
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in places.complete(folder)] == ["step-00000008", "step-00000010"]
    diagnosis = json.loads((folder / "diverged-00000012" / "diagnosis.json").read_text())
    assert diagnosis["samples"] == [sum(seen, [])]
    assert len(diagnosis["not_finite"]) == (place == "weights")
    run(digits, tmp_path / "run", *more)
    run(digits, tmp_path / "whole", *more)
    expected = newest(tmp_path / "whole")
    assert all(torch.equal(weight, expected[name]) for name, weight in newest(tmp_path / "run").items())


@pytest.mark.parametrize(("saved", "noticed_by"), [(True, "log"), (False, "log"), (True, "evaluation")])
def test_a_loss_that_is_no_number_names_the_checkpoint_that_is_kept(digits, tmp_path, monkeypatch, saved, noticed_by):
    step = Trainer.train_step

    def diverges(self, micro_batches):
        if self.step == 6:
            poison(self, "weights", float("nan"))
        step(self, micro_batches)

    monkeypatch.setattr(Trainer, "train_step", diverges)
    if noticed_by == "evaluation":
        monkeypatch.setattr(hooks.Log, "after_step", lambda *_: None)
    what = {"log": "not finite at step 7, 1 in a row", "evaluation": "the loss on the test set is nan"}[noticed_by]
    kept = "step-00000004 is kept" if saved else "there is no checkpoint before it"
    with pytest.raises(SharedError, match=f"{what}.*{kept}.*diverged-00000007"):
        run(digits, tmp_path / "run", "train.eval_every=0.7", *(["train.checkpoint_every=4"] if saved else []))
    assert len(places.complete(tmp_path / "run" / "checkpoints")) == saved


@pytest.mark.parametrize(("allowed", "stops"), [(1, False), (0, True)])
def test_a_step_that_is_not_finite_is_skipped_or_stops_the_run_before_it_changes_anything(
    digits, tmp_path, monkeypatch, allowed, stops
):
    step = Trainer.train_step

    def bad(self, micro_batches):
        if self.step == 6:
            before.append((self.flat.values.clone(), [batch.ids.tolist() for batch in micro_batches]))
            micro_batches = [batch._replace(images=batch.images * math.nan) for batch in micro_batches]
        step(self, micro_batches)
        if self.step == 7:
            assert torch.equal(self.flat.values, before[0][0])

    before = []
    monkeypatch.setattr(Trainer, "train_step", bad)
    more = ["train.log_every=4", f"train.bad_steps={allowed}", "schedule.steps=14"]
    if stops:
        with pytest.raises(SharedError, match="training has diverged: .* not finite at step 7.*diverged-00000007"):
            run(digits, tmp_path / "run", *more)
        folder = tmp_path / "run" / "checkpoints" / "diverged-00000007"
        diagnosis = json.loads((folder / "diagnosis.json").read_text(encoding="utf-8"))
        assert diagnosis["samples"] == [sum(before[0][1], [])]
        assert diagnosis["not_finite"] == []
        return
    run(digits, tmp_path / "run", *more)
    text = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    events = [event for event in map(json.loads, text.splitlines()) if event["kind"] == "train"]
    assert {event["step"]: event["skipped_steps"] for event in events} == {4: 0, 8: 1, 12: 0, 14: 0}


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_shares_of_clipped_rows_are_logged(digits, tmp_path, monkeypatch, implementation):
    """The whole network's, and each layer's that had one since the run began: what the optimizer counts."""
    counted, step, clipped = [], Trainer.train_step, AgcSgd.clipped

    def counts(self, micro_batches):
        step(self, micro_batches)
        found = clipped(self.optimizer)
        counted.append(found)
        monkeypatch.setattr(self.optimizer, "clipped", lambda: found)

    monkeypatch.setattr(Trainer, "train_step", counts)
    run(digits, tmp_path / "run", "train.log_every=1", "schedule.steps=4", "optim.clipping=0.01",
        f"optim.implementation={implementation}")  # fmt: skip
    text = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    events = [event for event in map(json.loads, text.splitlines()) if event["kind"] == "train"]
    assert len(events) == len(counted) == 4
    seen = set()
    for event, found in zip(events, counted, strict=True):
        assert event["clipped"] == sum(c.clipped for c in found.values()) / sum(c.rows for c in found.values())
        seen |= {name.rpartition(".")[0] for name, c in found.items() if c.clipped}
        assert {name.removeprefix("clipped/") for name in event if name.startswith("clipped/")} == seen
    layer = sorted(seen)[0]
    of_layer = [c for name, c in counted[-1].items() if name.rpartition(".")[0] == layer]
    assert events[-1][f"clipped/{layer}"] == sum(c.clipped for c in of_layer) / sum(c.rows for c in of_layer)
    assert 0 < events[-1]["clipped"] < 1


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.ABOUT])
def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(digits, tmp_path, capsys, name):
    run(digits, tmp_path / "run", "train.checkpoint_every=4")
    expected = {key: value.clone() for key, value in newest(tmp_path / "run").items()}  # not a map of the file
    folder = tmp_path / "run" / "checkpoints"
    damaged = folder / "step-00000012" / name
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 4
    damaged.write_bytes(data)
    (folder / ".step-00000013.writing").mkdir()
    run(digits, tmp_path / "run", "train.checkpoint_every=4")
    said = capsys.readouterr().out
    assert f"step-00000012 is damaged, {name} " in said
    assert re.search(r"goes on from \S+step-00000010, step 10 of 12", said)
    names = ["damaged-0-step-00000012", "step-00000010", "step-00000012"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert all(torch.equal(value, expected[name]) for name, value in newest(tmp_path / "run").items())
