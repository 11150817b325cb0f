"""How to start N ranks of a command on this machine: what `make demo` and the tests use; clusters have `srun`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from engine.comm.horovod import has_horovod, horovod_speaks_mpi
from loaders.errors import UserError


def rank_command(ranks: int, launcher: str = "auto") -> list[str]:
    """The words to put before `python -m …`; launcher "auto", "mpirun", "horovodrun", or "torchrun".

    Auto: mpirun with Horovod over MPI, else horovodrun with its Gloo, else torchrun, whichever is installed.
    The programs of this Python's own environment come first: an mpirun of another MPI starts N strangers.
    """
    if launcher == "auto":
        choices = ["mpirun"] if horovod_speaks_mpi() else []
        choices += ["horovodrun", "torchrun"] if has_horovod() else ["torchrun"]
        launcher = next((name for name in choices if _program(name)), "")
    program = _program(launcher)
    if program is None:
        missing = launcher or "mpirun, horovodrun or torchrun"
        raise UserError(f"cannot start {ranks} ranks: no {missing} found; `make env` installs one")
    if launcher == "mpirun":
        # More ranks than cores is normal here, and so is a container's root user.
        words = [program, "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]
        return words + (["--allow-run-as-root"] if os.geteuid() == 0 else []) + [sys.executable]
    if launcher == "horovodrun":
        return [program, "--gloo", "-np", str(ranks), sys.executable]
    return [program, "--nproc-per-node", str(ranks)]


def rank_environment(ranks: int) -> dict[str, str]:
    """This environment, with the cores shared out among the ranks."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | waiting(ranks) | {"OMP_NUM_THREADS": str(threads), "PATH": path}


def waiting(ranks: int) -> dict[str, str]:
    """Settings for how `ranks` ranks on this machine wait for each other.

    Open MPI spins while it waits. Each rank has a thread that computes and Horovod's, which waits: with fewer cores
    than that, waiting takes the core from computing. Yielding made two ranks on two cores nearly twice as fast.
    """
    return {"OMPI_MCA_mpi_yield_when_idle": "1"} if 2 * ranks > len(os.sched_getaffinity(0)) else {}


def _program(name: str) -> str | None:
    here = Path(sys.executable).parent / name
    return str(here) if here.exists() else shutil.which(name)
