import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.comm.horovod import has_horovod
from engine.comm.mpirun import rank_command, rank_environment
from engine.saving import signals

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no GPU on this machine")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def signals_as_before():
    """What a command line does with signals ends with its test, so that Ctrl-C ends the tests."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    if signals._ears is not None:  # what one test was told, another need not hear
        signal.set_wakeup_fd(-1)
        signals._ears.close()
        signals._ears = None


@pytest.fixture(scope="session")
def shared():
    """The folder with real images and reference material that may lie beside a checkout; the project needs none."""
    folder = Path(os.environ.get("BOOSTERBIT_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there (BOOSTERBIT_SHARED names another place)")
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Folder with packs of real digits, 8x8 pixels: low-train.h5 and low-test.h5 (0 to 4), high-… (5 to 9)."""
    folder = tmp_path_factory.mktemp("digits")
    for name, classes in (("low", "0,1,2,3,4"), ("high", "5,6,7,8,9")):
        for part in ("train", "test"):
            command = ["-m", "loaders.pack", "sklearn:digits", folder / f"{name}-{part}.h5", "--workers", "1"]
            options = ["--classes", classes, "--part", part, "--holdout", "0.3"]
            subprocess.run([sys.executable, *command, *options], check=True, cwd=ROOT)
    return folder


def run_words(words, env, timeout):
    """Run to the end, or kill the whole process group: ranks that hang must not outlive the test."""
    process = subprocess.Popen(
        words, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"still running after {timeout} s: {words}\n{out}\n{err}")
    return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.fixture(scope="session")
def launch():
    """Runs `python WORDS` on N ranks: launch(ranks, "mpirun" | "horovodrun" | "torchrun", WORDS).

    Under mpirun, one list of words per rank may be given instead of one for all. `threads`: of each rank.
    """

    def start(ranks, launcher, *words, timeout=300, threads=None):
        if launcher != "torchrun" and not has_horovod():
            pytest.skip("Horovod is not installed")
        if not Path(sys.executable).with_name(launcher).exists() and shutil.which(launcher) is None:
            pytest.skip(f"no {launcher} on this machine")
        command = rank_command(1 if len(words) > 1 else ranks, launcher)
        for index, others in enumerate(words):
            command += [*others] if index == 0 else [":", "-np", "1", sys.executable, *others]
        env = rank_environment(ranks) | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
        return run_words([str(word) for word in command], env, timeout)

    return start
