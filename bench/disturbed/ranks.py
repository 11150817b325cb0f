"""python -m bench.disturbed.ranks N WORDS: N ranks of `python WORDS` on this machine, started as lightly as by srun.

torchrun and mpirun take seconds by themselves, which a job that is started again each minute would be charged for.
Below `jobs/supervise.py --warm` ranks are forked.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from jobs.supervise import Forked
from loaders.output import as_command

_GRACE_S = 5.0
"""For the others to end after one has: what they know of it, they say."""


def run(ranks: int, words: list[str]) -> int:
    """The code of the first rank that ended otherwise than well, else 0. Signals are passed on to all."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [_start(words, meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]

    def pass_on(number: int, _: FrameType | None) -> None:
        for process in started:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, pass_on)
    code, until = 0, float("inf")
    while None in (codes := [process.poll() for process in started]):
        bad = next((each for each in codes if each), 0)
        if bad and not code:
            code, until = bad, time.monotonic() + _GRACE_S
        if time.monotonic() > until:
            for process in started:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    code = code or next((each for each in codes if each), 0)
    return code if code >= 0 else 128 - code


def _start(words: list[str], env: dict[str, str]) -> subprocess.Popen[bytes] | Forked:
    if words[0] == "-m" and "torch" in sys.modules:  # nothing here imports it: whoever forked this process has
        return Forked(words, env)
    return subprocess.Popen([sys.executable, *words], env=os.environ | env)


def main() -> int:
    """The command line."""
    return run(int(sys.argv[1]), sys.argv[2:])


if __name__ == "__main__":
    as_command(main)
