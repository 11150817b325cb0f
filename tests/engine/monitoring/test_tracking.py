"""Metrics in trackers of others: as they are asked, and by the packages themselves where they are installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.monitoring import metrics, tracking
from loaders.errors import UserError
from tests.conftest import ROOT

WITHOUT_NETWORK = """
import socket, sys
from pathlib import Path
sys.path.append(sys.argv[3])  # the last place to look: what the environment has is older or newer, and stays
connect = socket.socket.connect
def refused(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
        raise ConnectionRefusedError("no network here")
    return connect(self, address)
socket.socket.connect = refused
from engine.monitoring import metrics, tracking
name, folder = sys.argv[1], Path(sys.argv[2])
folder.mkdir(exist_ok=True)
log = metrics.MetricLog(folder, 0, tracker=tracking.begin(name, folder, "a title", {"model": {"name": "R50x1"}}))
for step in (1, 2, 3):
    log.write("train", step, {"loss": 1.25 / step, "learning_rate": 0.5})
log.write("val", 3, {"loss": 0.5, "top1": 62.5})
log.close()
"""


class Fake:
    """A package that takes all, until it breaks."""

    def __init__(self, fails=()):
        self.calls, self.fails = [], fails

    def _called(self, what, /, *words, **named):
        self.calls.append((what, words, named))
        if what in self.fails:
            raise RuntimeError("it broke")

    def init(self, **named):
        self._called("init", **named)
        return self

    def log(self, values, step):
        self._called("log", values, step)

    def finish(self):
        self._called("finish")


@pytest.fixture
def package(monkeypatch):
    def made(name, **how):
        fake = Fake(**how)
        monkeypatch.setitem(sys.modules, name, fake)
        monkeypatch.setenv("TRACKIO_DIR", "elsewhere")
        return fake

    return made


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_is_given_what_the_file_gets_once(tmp_path, package, name):
    fake = package(name)
    tracker = tracking.begin(name, tmp_path, "a title", {"a": 1})
    log = metrics.MetricLog(tmp_path, 1, tracker=tracker)
    log.write("train", 1, {"loss": 3.0, "learning_rate": 0.1})  # of before the run went on: there already
    log.write("train", 2, {"loss": 2.0, "learning_rate": 0.1})
    log.close()
    (begin, *_, named), *rest = fake.calls
    assert (begin, named["name"], named["config"], named["resume"]) == ("init", "a title", {"a": 1}, "allow")
    assert rest == [("log", ({"train/loss": 2.0, "train/learning_rate": 0.1}, 2), {}), ("finish", (), {})]


def test_wandb_is_offline_unless_asked_and_a_run_that_goes_on_keeps_its_name(tmp_path, package, monkeypatch):
    fake = package("wandb")
    tracking.begin("wandb", tmp_path, "t", {})
    monkeypatch.setenv("WANDB_MODE", "online")
    tracking.begin("wandb", tmp_path, "t", {})
    (tmp_path / "other").mkdir()
    tracking.begin("wandb", tmp_path / "other", "t", {})
    first, again, other = (named for _, _, named in fake.calls)
    assert [named["mode"] for named in (first, again, other)] == ["offline", "online", "online"]
    assert first["id"] == again["id"] != other["id"]


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_one_that_breaks_is_said_once_and_training_goes_on(tmp_path, package, caplog, fails):
    fake = package("trackio", fails=(fails,))
    tracker = tracking.begin("trackio", tmp_path, "t", {})
    for step in (1, 2):
        tracker.write("train", step, {"loss": 1.0})
    tracker.close()
    assert [record.message for record in caplog.records] == [
        "warning: trackio takes no more metrics (it broke); metrics.jsonl has them all"
    ]
    assert len([name for name, *_ in fake.calls if name == fails]) == 1


def test_one_that_is_not_there_or_does_not_begin_is_named(tmp_path, package, monkeypatch):
    assert tracking.begin("none", tmp_path, "t", {}) is None
    package("wandb", fails=("init",))
    with pytest.raises(UserError, match="tracking=wandb does not begin: it broke"):
        tracking.begin("wandb", tmp_path, "t", {})
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="tracking=trackio: it is not installed: pip install trackio"):
        tracking.begin("trackio", tmp_path, "t", {})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_packages_themselves_take_it_without_a_network(tmp_path, name):
    beside = Path(sys.prefix) / "trackers"  # jobs/env/make_env.sh
    if importlib.util.find_spec(name) is None and not (beside / name).is_dir():
        pytest.skip(f"{name} is not installed; make test puts it beside the environment")
    words = [sys.executable, "-c", WITHOUT_NETWORK, name, str(tmp_path / "run"), str(beside)]
    without = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "TRACKIO"))}
    done = subprocess.run(words, cwd=ROOT, env=without, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "no more metrics" not in done.stderr
    kept = [path.read_bytes() for path in (tmp_path / "run" / name).rglob("*") if path.is_file()]
    assert any(b"top1" in content for content in kept)
    assert any(b"62.5" in content for content in kept)
