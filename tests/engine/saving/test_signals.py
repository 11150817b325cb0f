import os
import signal
import subprocess
import sys
import time

import pytest

from engine.comm.communicator import Communicator, Stopped
from engine.comm.launch import Launch
from engine.saving import signals
from tests.conftest import ROOT

BUSY = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # in C code, where no handler of Python's runs
WAITING = "time.sleep(60)"
LISTENS = """
import hashlib, os, signal, sys, threading, time
from engine.saving import signals
signals.listen()
print("listens", flush=True)
"""


def started(code, **env):
    words = [sys.executable, "-c", LISTENS + code]
    process = subprocess.Popen(words, cwd=ROOT, env=os.environ | env, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == "listens\n"
    return process


@pytest.mark.parametrize("number", signals.SIGNALS)
@pytest.mark.parametrize("work", [BUSY, WAITING])
def test_the_first_signal_is_said_and_the_second_ends_at_once(work, number):
    process = started(work)
    process.send_signal(number)
    assert process.stderr.readline() == f"{number.name}: ends at the next step; a second one ends at once\n"
    time.sleep(signals.SAME_S + 0.1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=300)[1] == "SIGTERM again: ends at once\n"
    assert process.returncode == 128 + signal.SIGTERM


def test_what_a_launcher_passes_on_is_no_second_signal():
    process = started("while not signals.heard(): time.sleep(0.01)\ntime.sleep(0.3)\nprint(signals.heard())")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        process.send_signal(number)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0
    assert out == f"{said.partition(':')[0]}\n" and said.count("\n") == 1


def test_one_rank_speaks():
    process = started("os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.3)", RANK="1", WORLD_SIZE="2")
    assert process.communicate(timeout=300)[1] == ""


def test_what_was_heard_before_is_forgotten():
    signals.listen()
    assert signals.heard() is None
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signals.heard() == "SIGUSR1"
    with pytest.raises(Stopped, match="stopped by SIGUSR1 in a test"):
        signals.stop_if_heard(Communicator(Launch("alone")), "in a test")
    for _ in range(50):  # also where the thread is told late
        os.kill(os.getpid(), signal.SIGUSR1)
        signals.listen()
    time.sleep(0.1)
    assert signals.heard() is None
    signals.stop_if_heard(Communicator(Launch("alone")), "in a test")


def test_children_are_told_and_end_with_their_parent():
    """A parent that is killed tells nobody: the kernel does."""
    child = "from engine.saving import signals\nimport os, time\nsignals.listen()\nsignals.end_with(os.getppid())\n"
    child += "print('ready', flush=True)\nwhile not signals.heard(): time.sleep(0.01)\n"
    child += "print(signals.heard(), flush=True)\n"
    parent = "import subprocess\nwith signals.passed_on([subprocess.Popen([sys.executable, '-c', sys.argv[1]])]):\n"
    for number, name in ((signal.SIGUSR1, "SIGUSR1"), (signal.SIGKILL, "SIGTERM")):
        words = [sys.executable, "-c", f"{LISTENS}{parent}    time.sleep(60)", child]
        process = subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert [process.stdout.readline() for _ in range(2)] == ["listens\n", "ready\n"]
        process.send_signal(number)
        assert process.stdout.readline() == f"{name}\n"
        process.kill()
        process.communicate(timeout=300)
