"""A supervisor starts again what is worth it, and nothing else; shell scripts stand for runs."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jobs.supervise import Rules
from tests.conftest import ROOT

SAVE = "mkdir -p checkpoints/step-0000000"


def script(folder, lives):
    """A command whose first, second, … life does what is said; one more would end with 99."""
    cases = "\n".join(f"{number}) {life} ;;" for number, life in enumerate(lives, 1))
    path = folder / "run.sh"
    path.write_text(f'cd {folder}\necho x >> lives\ncase "$(wc -l < lives)" in\n{cases}\n*) exit 99 ;;\nesac\n')
    return ["bash", str(path)]


def begin(folder, lives, *options):
    words = ["-m", "jobs.supervise", "--folder", folder, "--wait", "0.05", *options, "--", *script(folder, lives)]
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def supervised(folder, lives, *options):
    """Its code, how many lives there were, and what it said."""
    process = begin(folder, lives, *options)
    said = process.communicate(timeout=300)[1]
    return process.returncode, len((folder / "lives").read_text().splitlines()), said


def test_a_run_that_gets_on_is_started_until_its_work_is_done(tmp_path):
    lives = [f"{SAVE}4; exit 75", f"{SAVE}6; kill -KILL $$", "exit 124", f"{SAVE}8; exit 1", "exit 1", "exit 0"]
    code, count, said = supervised(tmp_path, lives, "--restarts", "1")
    assert (code, count) == (0, 6), said
    for line in ("start 1, from step 0", "code 75 (stopped in good order)", "at step 4, 4 further", "killed by SIGKILL",
                 "start 3 ended with code 124 (the watchdog", "at step 6, 0 further", "the work is done"):  # fmt: skip
        assert line in said


@pytest.mark.parametrize(
    ("lives", "options", "code", "count", "says"),
    [
        (["exit 2"], [], 2, 1, "in the same way"),
        ([f"{SAVE}1; exit 1", "exit 2", f"{SAVE}2; exit 2", "exit 0"], [], 0, 4, "done"),  # a disk that was full
        (["kill -SEGV $$"] * 3, ["--restarts", "2"], 139, 3, "3 starts in a row left no newer checkpoint"),
        (["exit 75"] * 3, ["--restarts", "2"], 75, 3, "left no newer"),
        (["exit 75"], ["--leave-75"], 75, 1, "whoever started this job"),
        ([f"{SAVE}3; exit 1", "mv checkpoints/step-00000003 damaged; exit 1", f"{SAVE}3; exit 1"],
         ["--restarts", "1"], 1, 3, "2 starts in a row"),  # the same step again is no progress
        ([f"{SAVE}1; mkdir checkpoints/diverged-00000002; touch checkpoints/diverged-00000002/diagnosis.json; exit 2"],
         [], 2, 1, "has diverged"),
        (["sleep 600", "exit 0"], ["--silent", "1"], 0, 2, "gave no sign of life for 1 s and was killed"),
        (["kill -STOP $$", "exit 0"], ["--silent", "1"], 0, 2, "no sign of life"),
    ],
)  # fmt: skip
def test_what_is_started_again_and_what_is_not(tmp_path, lives, options, code, count, says):
    found, starts, said = supervised(tmp_path, lives, *options)
    assert (found, starts) == (code, count), said
    assert says in said


def test_a_run_that_touches_its_lock_lives(tmp_path):
    life = "for i in $(seq 8); do touch lock; sleep 0.3; done; exit 0"
    assert supervised(tmp_path, [life], "--silent", "1")[:2] == (0, 1)


@pytest.mark.parametrize("state", ["kill -STOP $left", "true"])
def test_what_outlives_its_launcher_is_ended_before_the_next_start(tmp_path, state):
    """A rank in a session of its own, perhaps stopped, would hold the run's folder."""
    first = f"setsid sleep 600 & left=$!; echo $left > left; sleep 0.2; {state}; kill -KILL $$"
    code, count, said = supervised(tmp_path, [first, "kill -0 $(cat left) && exit 3; exit 0"])
    assert (code, count) == (0, 2), said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_what_it_is_told_it_passes_on_and_starts_nothing_again(tmp_path, number):
    traps = "trap 'exit 75' TERM INT USR1; touch ready; while :; do sleep 0.05; done"
    process = begin(tmp_path, [traps])
    until = time.monotonic() + 300
    while not (tmp_path / "ready").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process.pid, number)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 75 and f"told {number.name}" in said, said
    assert (tmp_path / "lives").read_text() == "x\n"


def test_it_is_told_while_it_waits(tmp_path):
    process = begin(tmp_path, ["exit 1"], "--wait", "600")
    for line in process.stderr:
        if "waits 600 s" in line:
            process.terminate()
    assert process.wait(timeout=300) == 1


def test_waits_grow_to_a_limit():
    rules = Rules(restarts=9, wait_s=2.0, silent_s=1.0, leave_stopped=False)
    assert [rules.wait_before(n) for n in range(9)] == [0, 2, 4, 8, 16, 32, 64, 64, 64]


def test_a_command_that_is_not_there_is_named(tmp_path):
    words = ["-m", "jobs.supervise", "--folder", tmp_path, "--", tmp_path / "absent"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"error: {tmp_path / 'absent'} cannot be started: No such file" in done.stderr


FORKED = """
import os, pathlib, signal, sys
lives = pathlib.Path(sys.argv[1], "lives")
count = int(lives.read_text()) + 1 if lives.exists() else 1
lives.write_text(str(count))
if count == 1:
    os.kill(os.getpid(), signal.SIGKILL)
warm = "wave" in sys.modules and os.getsid(0) == os.getpid()
quiet = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
sys.exit({2: 75, 3: 0 if warm and quiet and __name__ == "__main__" else 3}[count])
"""


def test_what_is_kept_warm_is_forked_and_imports_nothing_again(tmp_path):
    """Its first life is killed, its second stops, its third looks at what it is."""
    (tmp_path / "forked_module.py").write_text(FORKED)
    words = ["-m", "jobs.supervise", "--folder", tmp_path, "--wait", "0.05", "--warm", "wave,json", "--",
             sys.executable, "-m", "forked_module", tmp_path]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lives").read_text() == "3"
    assert "start 1 was killed by SIGKILL" in done.stderr and "start 2 ended with code 75" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [(["wave", "--", "bash", "-m", "x"], "--warm is for a command that is python -m MODULE …, not bash"),
     (["wave", "--", sys.executable, "-c", "pass"], "--warm is for a command that is python -m"),
     (["no_such_module", "--", sys.executable, "-m", "json"], "--warm no_such_module: No module named")],
)  # fmt: skip
def test_what_cannot_be_kept_warm_is_told(tmp_path, words, says):
    words = ["-m", "jobs.supervise", "--folder", tmp_path, "--warm", *words]
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and f"error: {says}" in done.stderr
