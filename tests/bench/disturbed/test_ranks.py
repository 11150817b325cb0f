import signal
import subprocess
import sys
import time

from bench.disturbed import ranks
from tests.conftest import ROOT

TELLS = """
import os, pathlib, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(" ".join(os.environ[name] for name in names))
"""
FAILS = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit(7)
time.sleep(600)
"""
STOPS = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
pathlib.Path(sys.argv[1], os.environ["RANK"]).touch()
while True:
    time.sleep(0.05)
"""


def test_ranks_know_each_other(tmp_path):
    assert ranks.run(3, ["-c", TELLS, str(tmp_path)]) == 0
    told = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [words[:4] for words in told] == [[str(rank), str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert len({words[4] for words in told}) == 1


def test_the_code_is_that_of_the_rank_that_failed_and_the_others_are_ended(monkeypatch):
    monkeypatch.setattr(ranks, "_GRACE_S", 0.2)
    assert ranks.run(3, ["-c", FAILS]) == 7
    assert ranks.run(1, ["-c", "import os; os.kill(os.getpid(), 9)"]) == 137


def test_a_signal_comes_to_all(tmp_path):
    words = [sys.executable, "-m", "bench.disturbed.ranks", "2", "-c", STOPS, str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT) as process:
        until = time.monotonic() + 300
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=300) == 75
