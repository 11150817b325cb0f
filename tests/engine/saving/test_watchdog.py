"""Two processes that stand for ranks: what they wait for is a file, as a transport that hangs would be."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from engine.saving import watchdog
from tests.conftest import ROOT

RANK = """
import os, signal, sys, time
from pathlib import Path
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.saving import watchdog

rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])

def falls_asleep():
    time.sleep(60)

def busy(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.01)

def steps(numbers):
    for step in numbers:
        watchdog.passed(f"step {step}: forward")
        (folder / f"{step}-{rank}").touch()
        watchdog.passed(f"step {step}: sum")
        while size > 1 and not (folder / f"{step}-{1 - rank}").exists():
            time.sleep(0.01)

with watchdog.watching(Communicator(Launch("test", rank, size)), 2.0):
    while rank and not (folder / "heartbeats").exists():
        time.sleep(0.01)
    watchdog.share(folder if size > 1 else None)
    steps(range(3))
    watchdog.passed("step 3: forward")
    if rank == size - 1:
        time.sleep(0.1)
        FAULT
    steps(range(3, 6))
"""


def run(tmp_path, fault, size=2):
    """Exit codes and what was said, of ranks whose rank 1 (or only one) comes to `fault` in step 3."""
    code = RANK.replace("FAULT", fault)
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(size), tmp_path], cwd=ROOT, text=True,
                         stderr=subprocess.PIPE)
        for rank in range(size)
    ]  # fmt: skip
    said = [each.communicate(timeout=300)[1] for each in ranks]
    return [each.returncode for each in ranks], said


def test_a_rank_that_sleeps_is_named_and_all_end(tmp_path):
    codes, said = run(tmp_path, "falls_asleep()")
    assert codes == [watchdog.EXIT_CODE] * 2
    assert re.search(r"rank 1 on \S+ \(process \d+\) is behind: step 3: forward, for \d s\n", said[0])
    assert "1 other ranks wait: step 3: sum" in said[0] and not said[1]
    stacks = [(tmp_path / "stuck" / f"rank-0000{rank}.txt").read_text() for rank in (0, 1)]
    assert "in falls_asleep" in stacks[1] and "in falls_asleep" not in stacks[0]
    assert str(tmp_path / "stuck") in said[0]


def test_a_rank_that_is_stopped_is_named_and_does_not_stay(tmp_path):
    codes, said = run(tmp_path, "os.kill(os.getpid(), signal.SIGSTOP)")
    assert codes == [watchdog.EXIT_CODE, -signal.SIGKILL]
    assert re.search(r"rank 1 on .* is behind: no sign of life, last heard of at step \d: \w+, for \d s\n", said[0])


@pytest.mark.parametrize("doing", ["saving", "step 3: first"])
def test_what_takes_long_trips_nobody(tmp_path, doing):
    """Longer than the limit, by one rank, for which the other waits; not even where no thread gets a word in."""
    codes, said = run(tmp_path, f"watchdog.passed({doing!r}, slow=True); busy(3.0)")
    assert (codes, said) == ([0, 0], ["", ""])
    assert not (tmp_path / "heartbeats").exists() and not (tmp_path / "stuck").exists()


def test_a_process_that_was_stopped_as_a_whole_goes_on(tmp_path):
    """As by Ctrl-Z, or a scheduler that suspends a job: the time does not count."""
    waker = "import subprocess; subprocess.Popen(['sh', '-c', f'sleep 3; kill -CONT {os.getpid()}'])"
    codes, said = run(tmp_path, f"{waker}; os.kill(os.getpid(), signal.SIGSTOP); busy(0.3)", size=1)
    assert (codes, said) == ([0], [""])


def test_a_run_without_a_folder_says_its_stacks(tmp_path):
    codes, said = run(tmp_path, "falls_asleep()", size=1)
    assert codes == [watchdog.EXIT_CODE]
    assert re.search(r"rank 0 on \S+ \(process \d+\): step 3: forward, for \d s\n", said[0])
    assert "in falls_asleep" in said[0]
    assert not (tmp_path / "stuck").exists()


def test_no_limit(tmp_path, monkeypatch):
    with watchdog.watching(None, None):
        watchdog.passed("nothing is watched")
        watchdog.share(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_inside_another_leaves_that_one_watched():
    alone = type("One", (), {"size": 1, "rank": 0, "leads": True})
    with watchdog.watching(alone, 600.0):
        outer = watchdog._watchdog
        with watchdog.watching(alone, 600.0):
            assert watchdog._watchdog is not outer
        watchdog.passed("the first goes on")
        assert outer._place[1] == "the first goes on"
    assert watchdog._watchdog is None


def test_heartbeats_that_cannot_be_read_count_for_nothing(tmp_path):
    for content in ("", "{", "[]", json.dumps({"rank": 1}), "x" * 600):
        (tmp_path / "heartbeats").mkdir(exist_ok=True)
        (tmp_path / "heartbeats" / "rank-00001.json").write_text(content)
        dog = watchdog.Watchdog(type("Two", (), {"size": 2, "rank": 0, "leads": False}), 1.0)
        dog.share(tmp_path)
        assert dog._others() == []
        assert len((tmp_path / "heartbeats" / "rank-00000.json").read_bytes()) == 512
        assert os.listdir(tmp_path) == ["heartbeats"]
