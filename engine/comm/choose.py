"""Which communicator a launch gets."""

from __future__ import annotations

import shutil
import subprocess
import time

from engine.comm.communicator import Communicator
from engine.comm.horovod import HorovodCommunicator, has_horovod, horovod_has_nccl, horovod_speaks_mpi
from engine.comm.launch import Launch, detect_launch
from engine.comm.startup import import_torch
from engine.comm.torch_distributed import TorchCommunicator
from loaders.errors import UserError

BACKENDS = ("auto", "horovod", "torch", "local")


def _choose(backend: str, launch: Launch) -> str:
    if backend not in BACKENDS:
        raise UserError(f"comm.backend={backend} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    if launch.alone:
        return "local"
    if launch.by == "torchrun" or not has_horovod():  # torchrun gives Horovod no way to find its peers
        return "torch"
    import torch

    if torch.cuda.is_available() and not horovod_has_nccl():  # it would take each gradient through the host
        return "torch"
    return "horovod" if launch.by == "horovodrun" or horovod_speaks_mpi() else "torch"


def connect(backend: str = "auto", launch: Launch | None = None, patience_s: float | None = None) -> Communicator:
    """The communicator for this launch; `patience_s`: after which waiting for a rank is an error, where it ever is.

    Raises UserError where the launcher started more tasks than the communicator sees: each would train alone and
    write over the others' files.
    """
    import_torch()
    launch = launch or detect_launch()
    chosen = _choose(backend, launch)
    if chosen == "horovod" and not has_horovod():
        raise UserError(
            "comm.backend=horovod: Horovod is not installed for this torch; run `make env`, or take comm.backend=torch"
        )
    if chosen == "local":
        seen, comm = 1, Communicator(launch)
    elif chosen == "torch" and launch.alone:
        seen, comm = 1, Communicator(launch)  # nobody to talk to, and no address to meet at
    else:
        comm = TorchCommunicator(launch, patience_s) if chosen == "torch" else HorovodCommunicator(launch)
        seen = comm.size
    if seen != launch.size:
        time.sleep(0 if launch.rank == 0 else 1)  # let rank 0 speak before the launcher ends it
        raise UserError(
            f"{launch.by} started {launch.size} tasks, but {comm.name} sees {seen}: each task would train alone. "
            f"Under srun {_mpi_hint()} (and build Horovod with the MPI that srun serves); under mpirun, take the "
            "mpirun of the MPI that Horovod was built with; or choose comm.backend=torch. "
            f"Found here: rank {launch.rank}, local rank {launch.local_rank}"
        )
    return comm


def _mpi_hint() -> str:
    """Which --mpi to try: of the types that this cluster's srun lists, those that speak PMIx come first."""
    kinds = []
    if shutil.which("srun"):
        try:
            done = subprocess.run(
                ["srun", "--mpi=list"], capture_output=True, encoding="utf-8", errors="replace", timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return "add --mpi=… (see srun --mpi=list)"
        words = (done.stdout + done.stderr).replace(",", " ").split()
        kinds = sorted({word for word in words if "pmi" in word}, key=lambda word: ("pmix" not in word, word))
    if not kinds:
        return "add --mpi=… (see srun --mpi=list; often pmix)"
    return "add " + " or ".join(f"--mpi={kind}" for kind in kinds)
