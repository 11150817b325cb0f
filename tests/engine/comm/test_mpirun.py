import os
import sys

import pytest

from engine.comm import mpirun
from loaders.errors import UserError


@pytest.fixture
def installed(monkeypatch):
    """installed("mpirun", …, horovod=…, mpi=…): as if these programs were there, and Horovod built like this."""

    def pretend(*programs, horovod=True, mpi=True):
        monkeypatch.setattr(mpirun, "has_horovod", lambda: horovod)
        monkeypatch.setattr(mpirun, "horovod_speaks_mpi", lambda: mpi)
        monkeypatch.setattr(mpirun, "_program", lambda name: f"/bin/{name}" if name in programs else None)

    return pretend


@pytest.mark.parametrize(
    ("programs", "horovod", "mpi", "expected"),
    [
        ({"mpirun", "horovodrun", "torchrun"}, True, True, "mpirun"),
        ({"mpirun", "horovodrun", "torchrun"}, True, False, "horovodrun"),  # that mpirun is of no use to Horovod
        ({"horovodrun", "torchrun"}, True, True, "horovodrun"),
        ({"torchrun"}, True, True, "torchrun"),
        ({"mpirun", "horovodrun", "torchrun"}, False, False, "torchrun"),  # nor is either without Horovod
    ],
)
def test_the_launcher_is_one_that_horovod_understands(installed, programs, horovod, mpi, expected):
    installed(*programs, horovod=horovod, mpi=mpi)
    assert mpirun.rank_command(2)[0] == f"/bin/{expected}"
    assert mpirun.rank_command(2) == mpirun.rank_command(2, expected)


@pytest.mark.parametrize("root", [True, False])
def test_each_launcher_gets_its_own_words(installed, monkeypatch, root):
    """As the manuals of Open MPI, Horovod and torchrun have them; torchrun finds Python by itself."""
    installed("mpirun", "horovodrun", "torchrun")
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    as_root = ["--allow-run-as-root"] if root else []
    assert mpirun.rank_command(3, "mpirun") == [
        "/bin/mpirun", "--oversubscribe", "--bind-to", "none", "-np", "3", *as_root, sys.executable]  # fmt: skip
    assert mpirun.rank_command(3, "horovodrun") == ["/bin/horovodrun", "--gloo", "-np", "3", sys.executable]
    assert mpirun.rank_command(3, "torchrun") == ["/bin/torchrun", "--nproc-per-node", "3"]


def test_no_launcher_is_a_clear_message(installed):
    installed()
    with pytest.raises(UserError, match=r"cannot start 2 ranks: no mpirun, horovodrun or torchrun found; .*make env"):
        mpirun.rank_command(2)
    with pytest.raises(UserError, match=r"no horovodrun found"):
        mpirun.rank_command(2, "horovodrun")


def test_the_programs_of_this_environment_come_first(monkeypatch, tmp_path):
    for folder in ("mine", "theirs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mpirun").touch(mode=0o755)
    (tmp_path / "theirs" / "torchrun").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "mine" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "theirs"))
    assert mpirun.rank_command(1, "mpirun")[0] == str(tmp_path / "mine" / "mpirun")
    assert mpirun.rank_command(1, "torchrun")[0] == str(tmp_path / "theirs" / "torchrun")


@pytest.mark.parametrize(
    ("cores", "ranks", "threads", "yields"),
    [(8, 1, 8, False), (8, 4, 2, False), (8, 5, 1, True), (9, 4, 2, False), (2, 2, 1, True), (2, 7, 1, True)],
)
def test_ranks_share_the_cores_and_yield_where_these_are_fewer_than_their_threads(
    monkeypatch, cores, ranks, threads, yields
):
    """Each rank has two threads: one computes, one waits for the others."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setenv("BOOSTERBIT_SEEN", "as before")
    found = mpirun.rank_environment(ranks)
    assert found["OMP_NUM_THREADS"] == str(threads)
    assert found.get("OMPI_MCA_mpi_yield_when_idle") == ("1" if yields else None)
    assert found["BOOSTERBIT_SEEN"] == "as before"
    assert found["PATH"].split(os.pathsep)[0] == os.path.dirname(sys.executable)
