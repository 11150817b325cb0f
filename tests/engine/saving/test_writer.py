"""Checkpoints that are written while training goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine import pretrain
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.config.loading import load
from engine.config.schema import PretrainConfig
from engine.monitoring import metrics
from engine.network import bit
from engine.optim import AgcSgd, named_groups
from engine.optim.flat import FlatParameters
from engine.saving import checkpoint, places
from engine.saving import writer as writer_module
from engine.saving.writer import HostMemory, Writer, copy_all
from engine.training import hooks
from tests.conftest import ROOT
from tests.support.waits import Waits


def trained(steps=2):
    """A network in flat memory, and an optimizer that has a momentum, as in training."""
    torch.manual_seed(0)
    model = bit.build("R8x0.25-8px", 5)
    flat = FlatParameters(model, channels_last=True)
    optimizer = AgcSgd(named_groups(model, 1e-4, "none"), lr=0.1)
    for _ in range(steps):
        flat.grads.normal_()
        optimizer.step()
    return model, optimizer


def state_of(optimizer, step=3):
    return {"step": step, "optimizer": optimizer.state_dict(), "scaler": {}}


def momenta(state):
    return [each["momentum_buffer"] for each in state["optimizer"]["state"].values()]


def test_a_copy_is_what_was_there_and_stays_so_while_training_goes_on():
    model, optimizer = trained()
    memory = HostMemory()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    old = [value.clone() for value in momenta(state_of(optimizer))]
    weights, state = memory.copy(model.state_dict(), state_of(optimizer))
    with torch.no_grad():
        for value in (*model.parameters(), *momenta(state_of(optimizer))):
            value.add_(1)
    assert list(weights) == list(before)
    for name, value in before.items():
        assert torch.equal(weights[name], value) and weights[name].is_contiguous(), name
    live = momenta(state_of(optimizer))
    assert any(not value.is_contiguous() for value in live)
    for copied, value, now in zip(momenta(state), old, live, strict=True):
        assert torch.equal(copied, value) and copied.stride() == now.stride()
    assert state["step"] == 3
    assert state["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]


def test_memory_is_taken_once_and_each_copy_has_a_storage_of_its_own():
    """What torch saves of a tensor is its storage."""
    model, optimizer = trained()
    memory = HostMemory()
    places_of = []
    for _ in range(2):
        weights, state = memory.copy(model.state_dict(), state_of(optimizer))
        copies = [*weights.values(), *momenta(state)]
        places_of.append([value.data_ptr() for value in copies])
        assert all(value.untyped_storage().nbytes() == value.numel() * 4 for value in copies)
    assert places_of[0] == places_of[1]
    ends = sorted((place, place + value.numel() * 4) for place, value in zip(places_of[0], copies, strict=True))
    assert all(end <= begin for (_, end), (begin, _) in zip(ends, ends[1:], strict=False))
    weights, _ = memory.copy({"other": torch.ones(3, 2, dtype=torch.float64)}, {"step": 1})
    assert torch.equal(weights["other"], torch.ones(3, 2, dtype=torch.float64))


def test_values_of_all_kinds_are_copied():
    kinds = [torch.tensor(3.5), torch.empty(0, 4), torch.arange(6).reshape(2, 3).T, torch.ones(2, dtype=torch.bool),
             torch.zeros(5)[::2], torch.ones(1).expand(4)]  # fmt: skip
    value = {"a": [kinds[0], {"b": (kinds[1], "text")}], 3: kinds[2:], "n": None}
    _, found = HostMemory().copy({}, value)
    assert torch.equal(found["a"][0], kinds[0]) and found["a"][1]["b"][1] == "text" and found["n"] is None
    assert found["a"][1]["b"][0].shape == (0, 4)
    for copied, one in zip(found[3], kinds[2:], strict=True):
        assert torch.equal(copied, one) and copied.dtype == one.dtype


def test_a_copy_from_a_gpu_waits_once_for_all_of_it():
    """On fake CUDA tensors: no copy by itself makes the host wait."""
    with FakeTensorMode():
        with torch.device("cuda"):
            model = bit.build("R8x0.25-8px", 5)
        values = [*FlatParameters(model, channels_last=True).parameters, torch.empty(3, 4, device="cuda").T]
        hosts = [torch.empty(value.shape) for value in values]
        with Waits() as waits:
            copy_all(hosts, values)
        assert waits.seen >= len(values) and waits.found == []


@pytest.mark.gpu
def test_what_is_copied_from_a_gpu_is_what_was_there():
    model, optimizer = trained()
    model.cuda()
    memory = HostMemory()
    for _ in range(2):
        with torch.no_grad():
            for value in model.parameters():
                value.add_(1)
        weights, _ = memory.copy(model.state_dict(), {"momentum": next(model.parameters()).half()})
        assert all(torch.equal(weights[name], value.cpu()) for name, value in model.state_dict().items())
        assert all(value.is_pinned() for value in weights.values())


class Slow:
    """A disk that takes nothing until it is told to."""

    def __init__(self, folder):
        self.folder, self.begun, self.goes_on, self.order = folder, threading.Event(), threading.Event(), []

    def __call__(self, weights, state):
        self.order.append(f"begins {state['step']}")
        self.begun.set()
        assert self.goes_on.wait(60)
        checkpoint.save(self.folder, weights, state, {"step": state["step"]}, keep=5)
        self.order.append(f"ends {state['step']}")
        return True


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_waits_for_it(tmp_path):
    model, slow = nn.Linear(3, 2), Slow(tmp_path)
    expected = {}
    with Writer() as writer:
        for step in (1, 2):
            expected[step] = {name: value.clone() for name, value in model.state_dict().items()}
            if step == 2:
                assert slow.begun.wait(60) and writer.finished() == [] and places.complete(tmp_path) == []
                threading.Timer(0.2, slow.goes_on.set).start()  # the second comes before the first is written
            writer.start(step, slow, model.state_dict(), {"step": step})
            with torch.no_grad():
                model.weight.add_(1)
        assert writer.wait()
        assert [saved.step for saved in writer.finished()] == [1, 2]
        assert writer.finished() == []
    assert slow.order == ["begins 1", "ends 1", "begins 2", "ends 2"]
    for path in places.complete(tmp_path):
        found = checkpoint.load(path)
        assert all(torch.equal(found.weights[name], value) for name, value in expected[found.state["step"]].items())


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_what_is_under_way_when_a_run_ends_is_written(tmp_path, ends):
    slow = Slow(tmp_path)
    threading.Timer(0.2, slow.goes_on.set).start()
    try:
        with Writer() as writer:
            writer.start(1, slow, nn.Linear(3, 2).state_dict(), {"step": 1})
            if ends == "badly":
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert [path.name for path in places.complete(tmp_path)] == ["step-00000001"]


@pytest.mark.parametrize("background", [True, False])
def test_an_error_of_the_disk_comes_to_whoever_asks_next_and_the_next_is_written(background):
    def fails(weights, state):
        raise OSError(5, "Input/output error", "there")

    with Writer(background) as writer:
        with pytest.raises(OSError, match="there"):
            writer.start(1, fails, {}, {})
            writer.start(2, fails, {}, {})
        assert not writer.wait() and writer.finished() == []
        writer.start(3, lambda weights, state: False, {}, {})
        assert not writer.wait()
        writer.start(4, lambda weights, state: True, {}, {})
        assert writer.wait() and [saved.step for saved in writer.finished()] == [4]
    assert writer.told().startswith("saved in ") and writer.told() == ""


def test_an_error_of_the_disk_does_not_hide_why_a_run_ends(caplog):
    def fails(weights, state):
        raise OSError(5, "Input/output error", "there")

    with pytest.raises(ZeroDivisionError), Writer() as writer:
        writer.start(1, fails, {}, {})
        raise ZeroDivisionError
    assert "the checkpoint under way could not be written: there: Input/output error" in caplog.text


def test_without_memory_for_a_copy_training_waits_for_the_disk(tmp_path, caplog, monkeypatch):
    # More than there are addresses: a limit of this process would count what other tests left free in it as well.
    monkeypatch.setattr(writer_module, "_taken", lambda kinds, pinned: [torch.empty(2**60, dtype=torch.uint8)])
    weights = {"w": torch.ones(2**10)}
    write = Slow(tmp_path)
    write.goes_on.set()
    with Writer() as writer:
        writer.start(1, write, weights, {"step": 1})
        assert write.order == ["begins 1", "ends 1"]
        writer.start(2, lambda weights, state: True, weights, {"step": 2})
    assert caplog.text.count("training waits for the disk") == 1
    assert torch.equal(checkpoint.load(tmp_path / "step-00000001").weights["w"], weights["w"])


STEPS = ["schedule.epochs=null", "schedule.steps=12", "schedule.warmup_steps=2", "train.log_every=1", "train.keep=9",
         "train.checkpoint_every=4", "data.backend=host"]  # fmt: skip


def settings(digits, folder, *more):
    return [f"data.train={digits / 'low-train.h5'}", f"data.val={digits / 'low-test.h5'}", f"folder={folder}",
            "name=same", *STEPS, *more]  # fmt: skip


def run(digits, folder, *more):
    config = load(PretrainConfig, "demo", settings(digits, folder, *more), "pretrain")
    pretrain.pretrain(config, Communicator(Launch("alone")))


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """A run whose checkpoints were written at once."""
    folder = tmp_path_factory.mktemp("at-once") / "run"
    run(digits, folder, "train.async_save=false", "train.keep_best=true", "train.eval_every=0.3")
    return folder


def contents(folder):
    """All that checkpoints hold, by name: bytes of the weights, and what is loaded of the rest."""
    found = {}
    for path in (*places.complete(folder / "checkpoints"), *places.complete(folder / "best")):
        state = checkpoint.load(path).state
        groups = state["optimizer"]["param_groups"]
        values = [value.numpy().tobytes() for value in momenta(state)]
        found[str(path.relative_to(folder))] = (path / checkpoint.WEIGHTS).read_bytes(), values, groups, state["step"]
    return found


def test_what_is_written_beside_training_is_what_is_written_at_once(digits, tmp_path, whole, capsys):
    run(digits, tmp_path / "run", "train.keep_best=true", "train.eval_every=0.3")
    assert contents(tmp_path / "run") == contents(whole)
    assert {"checkpoints/step-00000004", "checkpoints/step-00000012"} <= contents(whole).keys()
    saved = [event for event in metrics.read(tmp_path / "run" / "metrics.jsonl") if event["kind"] == "save"]
    assert {4, 8, 12} <= {event["step"] for event in saved}
    assert all(event["stall_s"] >= 0 and event["write_s"] > 0 for event in saved)
    assert "  saved in " in capsys.readouterr().out


def test_a_stop_waits_for_what_is_being_written(digits, tmp_path, monkeypatch):
    """Asked for at the step whose checkpoint is under way: it is written once, and whole before the run ends."""
    saves, save = [], checkpoint.save

    def slow(folder, weights, state, *rest):
        saves.append(state["step"])
        time.sleep(0.3)
        return save(folder, weights, state, *rest)

    monkeypatch.setattr(checkpoint, "save", slow)
    after_step = hooks.SaveCheckpoints.after_step

    def stops(self, trainer):
        after_step(self, trainer)
        if trainer.step == 4:
            self.save(trainer)
            assert [path.name for path in places.complete(tmp_path / "run" / "checkpoints")] == ["step-00000004"]
            raise ZeroDivisionError

    monkeypatch.setattr(hooks.SaveCheckpoints, "after_step", stops)
    with pytest.raises(ZeroDivisionError):
        run(digits, tmp_path / "run")
    assert saves == [4]


HANGS = """
import os, runpy, sys, time
fsync, (place, sign) = os.fsync, sys.argv[1:3]
def hangs(handle):
    name = os.readlink(f"/proc/self/fd/{handle}")
    if "step-00000008.writing" in name and name.endswith(place):
        open(sign, "w").close()
        time.sleep(600)
    fsync(handle)
os.fsync = hangs
sys.argv = sys.argv[3:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("place", ["state.pt", ".writing"])
def test_a_kill_while_the_writer_works_leaves_the_older_checkpoint_to_go_on_from(digits, tmp_path, whole, place):
    """Training has gone on meanwhile; then the process is killed, and the same command ends with the same bytes."""
    sign, folder = tmp_path / "sign", tmp_path / "run"
    words = [place, sign, "engine.pretrain", "demo", *settings(digits, folder), "comm.backend=local"]
    process = subprocess.Popen([sys.executable, "-c", HANGS, *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 300
    steps = set()
    while not (sign.exists() and max(steps, default=0) > 8) and time.monotonic() < until:
        time.sleep(0.05)
        if (folder / "metrics.jsonl").exists():
            steps = {event["step"] for event in metrics.read(folder / "metrics.jsonl") if event["kind"] == "train"}
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert sign.exists() and max(steps) > 8
    assert [path.name for path in places.complete(folder / "checkpoints")][-1] < "step-00000008"
    assert (folder / "checkpoints" / ".step-00000008.writing").is_dir()
    run(digits, folder)
    assert not list(Path(folder / "checkpoints").glob(".*"))
    expected = contents(whole)
    assert {name: value for name, value in contents(folder).items() if name in expected}["checkpoints/step-00000012"] \
        == expected["checkpoints/step-00000012"]  # fmt: skip
