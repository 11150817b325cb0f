"""A process that has imported what is slow to import, and forks to run tests: a line of JSON in, a line of JSON out.

    python -m tests.support.warm torch scipy.stats

It runs in the root of a copy of the tree, and imports nothing of that tree: a fork imports what stands there then.
In: {"tests": paths, "seconds": {test: s, as far as known}, "patience": s that a test may take, or null, "timeout": s,
"sound": whether the tree is without a fault: then caches are written, and a test is given up after `patience`}.
Out: {"outcome": "passed" | "failed" | "timeout", "by": the first test that failed, "seconds": s, "each": {test: s}}.
"""

import importlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

MARK = "BOOSTERBIT_MUTANT"  # in the environment of whatever a fork starts, so that it can be found and ended
MOST_MEMORY, MOST_FILE = 8 << 30, 1 << 30  # bytes: what a fault may take of the machine


class Watch:
    """A pytest plugin: the fastest tests first, for one failure is enough, and none that try one's patience."""

    def __init__(self, job: dict):
        self.seconds, self.patience, self.sound = job["seconds"], job["patience"], job["sound"]
        self.each, self.by = {}, ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        items.sort(key=lambda item: self.seconds.get(item.nodeid, 0.0))
        if self.patience is not None:
            slow = [item for item in items if self.seconds.get(item.nodeid, 0.0) > self.patience]
            config.hook.pytest_deselected(items=slow)
            del items[len(items) - len(slow) :]
            self.each = {item.nodeid: self.seconds[item.nodeid] for item in slow}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self):
        if self.sound and self.patience is not None:
            signal.signal(signal.SIGALRM, lambda *_: pytest.skip("slow"))
            signal.setitimer(signal.ITIMER_REAL, self.patience)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def pytest_collectreport(self, report):
        self._failed(report)

    def pytest_runtest_logreport(self, report):
        self.each[report.nodeid] = round(self.each.get(report.nodeid, 0.0) + report.duration, 2)
        self._failed(report)

    def _failed(self, report):
        if report.failed:
            self.by = self.by or report.nodeid


def run_tests(job: dict, answer: Path, log: Path) -> None:
    """In the fork: runs the tests, leaves what came of them in the file `answer`, and ends."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ[MARK] = str(os.getpid())
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_FILE, MOST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with log.open("w") as out, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        if not job["sound"]:
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        watch = Watch(job)
        temporary = f"--basetemp={answer.with_suffix('.files')}"
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", temporary, *job["tests"]], plugins=[watch])
        answer.write_text(json.dumps({"code": int(code), "by": watch.by, "each": watch.each}))
        sys.stdout.flush()
    os._exit(0)


def end(child: int) -> None:
    """Ends what the fork has started: its session, and what bears its mark and has a session of its own."""
    for found in psutil.process_iter():
        try:
            if os.getsid(found.pid) == child or found.environ().get(MARK) == str(child):
                found.kill()
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue  # gone meanwhile, or another user's


def judge(job: dict, folder: Path) -> dict:
    """Forks, waits until the tests are done or the time is over."""
    answer, start = folder / "answer.json", time.monotonic()
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            run_tests(job, answer, folder / "tests.log")
        finally:  # a defect here must not go on as a second server
            os._exit(1)
    done, status = 0, 0
    try:
        while not done and time.monotonic() - start < job["timeout"]:
            time.sleep(0.02)
            done, status = os.waitpid(child, os.WNOHANG)
    finally:  # also where this process is told to end
        end(child)
    if not done:
        os.waitpid(child, 0)
    seconds = round(time.monotonic() - start, 1)
    found = {"outcome": "timeout", "by": "", "each": {}, "seconds": seconds}
    if done and answer.exists():
        said = json.loads(answer.read_text())
        found |= {"outcome": "failed" if said["code"] else "passed", "by": said["by"], "each": said["each"]}
    elif done:
        found |= {"outcome": "failed", "by": f"the process ended with {os.waitstatus_to_exitcode(status)}"}
    return found


def main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    folder = Path("..").resolve()  # beside the copy, not in it
    sys.argv = ["pytest"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which ends this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    for line in sys.stdin:
        print(json.dumps(judge(json.loads(line), folder)), flush=True)


if __name__ == "__main__":
    main()
