"""On a terminal, what is printed and the bar of progress do not write over each other."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from tests.conftest import ROOT

SHORT = ["schedule.epochs=null", "schedule.steps=3", "schedule.warmup_steps=1", "train.log_every=1",
         "data.backend=host", "comm.backend=local", "data.val=null"]  # fmt: skip


def on_a_terminal(words):
    """What a command leaves on the screen of a wide terminal, line by line."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 300, 0, 0))  # lines, columns
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, env=env)
    os.close(slave)
    written = b""
    while True:
        try:
            written += (part := os.read(master, 4096))
        except OSError:  # EIO: the other side is closed
            break
        if not part:
            break
    os.close(master)
    assert process.wait(timeout=300) == 0, written.decode()
    return [screen(line) for line in written.decode().split("\r\n")]


def screen(line):
    """A line after its carriage returns: what comes after one goes over what was before it."""
    assert not re.search(r"\x1b\\[\d*[A-H]", line), "moves the cursor"
    shown = ""
    for part in line.split("\r"):
        shown = part + shown[len(part) :]
    return shown.rstrip()


@pytest.mark.parametrize("again", [False, True], ids=["new", "resumed"])
def test_lines_and_bar_are_told_apart(digits, tmp_path, again):
    words = ["-m", "engine.pretrain", "demo", f"data.train={digits / 'low-train.h5'}", f"folder={tmp_path}", *SHORT]
    if again:
        subprocess.run([sys.executable, *words, "name=demo"], cwd=ROOT, check=True, capture_output=True)
        words = [word.replace("steps=3", "steps=5") for word in words]
    lines = on_a_terminal(words)
    bars = [line for line in lines if re.match(r" *\d+%\|", line)]
    assert len(bars) == 1 and bars[0].startswith("100%")
    plain = subprocess.run([sys.executable, *words, f"folder={tmp_path}-2"], cwd=ROOT, check=True, capture_output=True)
    first = plain.stdout.decode().splitlines()[0]
    assert lines[0] == first
    assert not [line for line in lines if "%|" in line and line not in bars]
