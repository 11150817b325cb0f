import random
import subprocess
import time
from collections import Counter
from itertools import islice

import pytest

from bench.disturbed import disturb


def test_disturbances_come_as_often_as_asked_and_all_kinds_of_them():
    kinds = list(disturb.KINDS)
    due = list(islice(disturb.schedule(3, 60.0, kinds), 6000))
    assert due == list(islice(disturb.schedule(3, 60.0, kinds), 6000))
    assert due != list(islice(disturb.schedule(4, 60.0, kinds), 6000))
    waits = [later.at_s - one.at_s for one, later in zip(due, due[1:], strict=False)]
    assert min(waits) >= 0
    assert sum(waits) / len(waits) == pytest.approx(60.0, rel=0.05)  # 4 standard errors
    assert sum(wait > 60.0 for wait in waits) / len(waits) == pytest.approx(2.718281828**-1, abs=0.03)
    assert set(Counter(one.kind for one in due).values()) == {1000}
    assert len({tuple(one.kind for one in due[at : at + 6]) for at in range(0, 6000, 6)}) > 100


def test_all_that_lives_below_a_process_is_found():
    with subprocess.Popen(["bash", "-c", "sleep 600 & (sleep 600 & wait) & true & wait -n; sleep 600; true"]) as shell:
        try:
            until = time.monotonic() + 300
            while len(disturb.descendants(shell.pid)) < 4 and time.monotonic() < until:
                time.sleep(0.05)
            found = disturb.descendants(shell.pid)
            assert len(found) == 4 and shell.pid not in found  # three sleeps and a shell, not what has ended
        finally:
            for pid in (*disturb.descendants(shell.pid), shell.pid):
                subprocess.run(["kill", "-KILL", str(pid)], check=True)


def test_nothing_is_disturbed_before_all_ranks_train(tmp_path):
    job = disturb.Job(tmp_path, tmp_path / "filler", random.Random(0), 1.0)
    assert not any(job.disturb(0, kind) for kind in disturb.KINDS)
    (tmp_path / "heartbeats").mkdir()
    gone = '{"rank": %d, "pid": 4194300, "started": 1, "doing": "step 3: optimizer"}'
    for rank in (0, 1):
        (tmp_path / "heartbeats" / f"rank-0000{rank}.json").write_text(gone % rank)
    assert not any(job.disturb(0, kind) for kind in disturb.KINDS)
