"""One small interface to the other ranks: alone, through Horovod (NCCL, MPI, Gloo), or torch.distributed.

Everything the engine says to other ranks goes through a `Communicator`; no other module names a library for it.
Collectives are called by all ranks in the same order. Large ones are in place, on contiguous 1-D tensors.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch

from engine.comm.launch import Launch, detect_launch, rendezvous
from loaders.errors import UserError

BACKENDS = ("auto", "horovod", "torch", "local")


class SharedError(UserError):
    """A UserError that all ranks raise at the same point, so that they can leave in good order, and one speaks."""

    exit_code = 2


class Stopped(SharedError):
    """Training stopped on request after a checkpoint; the same command goes on from there."""

    exit_code = 75  # EX_TEMPFAIL: job scripts requeue on it


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> None: ...


class Communicator:
    """A process that runs alone, and the interface of those that do not."""

    name = "local"

    def __init__(self, launch: Launch) -> None:
        self.rank, self.size, self.local_rank = launch.rank, launch.size, launch.local_rank
        self.launch = launch

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that speaks and writes files."""
        return self.rank == 0

    def start_sum_(self, tensor: torch.Tensor, name: str) -> Handle:
        """Start to replace `tensor` (1-D, contiguous) by its sum over all ranks; `name` is the same everywhere."""
        return _Done()

    def sum_(self, tensor: torch.Tensor, name: str = "sum") -> torch.Tensor:
        """Sum over all ranks, in place, at once: for small tensors such as metrics. Returns `tensor`."""
        self.start_sum_(tensor, name).wait()
        return tensor

    def broadcast_(self, tensor: torch.Tensor, name: str = "broadcast") -> None:
        """Replace `tensor` by that of rank 0."""

    def gather(self, array: np.ndarray, name: str = "gather") -> np.ndarray:
        """Rows of all ranks, in rank order, on every rank. Shape (n, …) in, the same n everywhere; (size·n, …) out."""
        return array

    def exchange(self, value: Any) -> list[Any]:
        """The (small, picklable) value of each rank, in rank order, on every rank."""
        return [value]

    def close(self) -> None:
        """Leave in good order: all ranks call it."""

    def abort(self, code: int) -> None:
        """End this process at once, so that the launcher ends the others: none is left waiting in a collective."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block whose UserError on one rank becomes a SharedError on all: they stop together.

        The block must hold no collective of its own.
        """
        error: UserError | None = None
        try:
            yield
        except UserError as found:
            error = found
        said = self.exchange(None if error is None else str(error))
        messages = sorted({text for text in said if text is not None})
        if messages:
            ranks = [rank for rank, text in enumerate(said) if text is not None]
            where = "" if len(ranks) == self.size else f" (on rank {', '.join(map(str, ranks))} of {self.size})"
            raise SharedError("; ".join(messages) + where) from error


class _Done:
    def wait(self) -> None:
        return None


class HorovodCommunicator(Communicator):
    """Horovod over MPI, Gloo, or NCCL, as it was built and launched."""

    name = "horovod"

    def __init__(self, launch: Launch) -> None:
        import horovod.torch as hvd

        super().__init__(launch)
        self._hvd = hvd
        hvd.init()
        self.rank, self.size, self.local_rank = hvd.rank(), hvd.size(), hvd.local_rank()
        transport = "MPI" if hvd.mpi_enabled() else "Gloo"
        self.name = f"horovod ({transport}{' + NCCL' if hvd.nccl_built() and torch.cuda.is_available() else ''})"

    def start_sum_(self, tensor: torch.Tensor, name: str) -> Handle:
        handle = self._hvd.allreduce_async_(tensor, name=name, op=self._hvd.Sum)
        return _HorovodHandle(self._hvd, handle)

    def broadcast_(self, tensor: torch.Tensor, name: str = "broadcast") -> None:
        self._hvd.broadcast_(tensor, root_rank=0, name=name)

    def gather(self, array: np.ndarray, name: str = "gather") -> np.ndarray:
        return self._hvd.allgather(torch.from_numpy(np.ascontiguousarray(array)), name=name).numpy()

    def exchange(self, value: Any) -> list[Any]:
        # Horovod gathers rows of any number from each rank, so a pickle is a column of bytes and a length.
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        lengths = self._hvd.allgather(torch.tensor([data.numel()]), name="exchange.lengths").tolist()
        parts = self._hvd.allgather(data, name="exchange.bytes").split(lengths)
        return [pickle.loads(part.numpy().tobytes()) for part in parts]

    def close(self) -> None:
        self._hvd.shutdown()

    def abort(self, code: int) -> None:
        if self._hvd.mpi_enabled() and importlib.util.find_spec("mpi4py"):
            # srun does not end the other tasks when one exits; MPI's own abort does.
            from mpi4py import MPI

            sys.stdout.flush()
            sys.stderr.flush()
            MPI.COMM_WORLD.Abort(code)
        super().abort(code)


class _HorovodHandle:
    def __init__(self, hvd: Any, handle: int) -> None:
        self._hvd, self._handle = hvd, handle

    def wait(self) -> None:
        self._hvd.synchronize(self._handle)


class TorchCommunicator(Communicator):
    """torch.distributed: NCCL for CUDA tensors, Gloo for the rest."""

    name = "torch.distributed"

    def __init__(self, launch: Launch) -> None:
        import torch.distributed as dist

        super().__init__(launch)
        meeting = rendezvous(launch)
        if meeting is None:
            raise UserError(
                f"torch.distributed does not know where its {launch.size} ranks meet ({launch.by} launch over "
                "several nodes); set MASTER_ADDR to the first node's name and MASTER_PORT to a free port"
            )
        address, port = meeting
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        self._dist = dist
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}:{port}" if "TORCHELASTIC_RUN_ID" not in os.environ else "env://",
            rank=launch.rank,
            world_size=launch.size,
            timeout=timedelta(minutes=10),
        )
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.name = f"torch.distributed ({'NCCL' if torch.cuda.is_available() else 'Gloo'})"

    def start_sum_(self, tensor: torch.Tensor, name: str) -> Handle:
        return self._dist.all_reduce(tensor, async_op=True)

    def broadcast_(self, tensor: torch.Tensor, name: str = "broadcast") -> None:
        self._dist.broadcast(tensor, src=0)

    def gather(self, array: np.ndarray, name: str = "gather") -> np.ndarray:
        mine = torch.from_numpy(np.ascontiguousarray(array))
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        self._dist.all_gather(rows, mine)
        return torch.cat(rows).numpy()

    def exchange(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        self._dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        self._dist.destroy_process_group()


def has_horovod() -> bool:
    """Whether Horovod for torch is installed and loads."""
    if importlib.util.find_spec("horovod") is None:
        return False
    try:
        import horovod.torch  # noqa: F401
    except (ImportError, OSError):  # built for another torch or MPI: as good as absent
        return False
    return True


def horovod_speaks_mpi() -> bool:
    """Whether Horovod is there and was built with MPI; without, it has Gloo."""
    if not has_horovod():
        return False
    import horovod.torch as hvd

    return hvd.mpi_built()


def _choose(backend: str, launch: Launch) -> str:
    if backend not in BACKENDS:
        raise UserError(f"comm.backend={backend} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    if launch.alone:
        return "local"
    if launch.by == "torchrun" or not has_horovod():  # torchrun gives Horovod no way to find its peers
        return "torch"
    return "horovod" if launch.by == "horovodrun" or horovod_speaks_mpi() else "torch"


def connect(backend: str = "auto", launch: Launch | None = None) -> Communicator:
    """The communicator for this launch.

    Raises UserError where the launcher started more tasks than the communicator sees: each would train alone and
    write over the others' files.
    """
    launch = launch or detect_launch()
    chosen = _choose(backend, launch)
    if chosen == "horovod" and not has_horovod():
        raise UserError(
            "comm.backend=horovod: Horovod is not installed for this torch; run `make env`, or take comm.backend=torch"
        )
    kinds = {"horovod": HorovodCommunicator, "torch": TorchCommunicator, "local": Communicator}
    if chosen == "local":
        seen, comm = 1, Communicator(launch)
    elif chosen == "torch" and launch.alone:
        seen, comm = 1, Communicator(launch)  # nobody to talk to, and no address to meet at
    else:
        comm = kinds[chosen](launch)
        seen = comm.size
    if seen != launch.size:
        time.sleep(0 if launch.rank == 0 else 1)  # let rank 0 speak before the launcher ends it
        raise UserError(
            f"{launch.by} started {launch.size} tasks, but {comm.name} sees {seen}: each task would train alone. "
            "Under srun add --mpi=pmix (and build Horovod with the MPI that srun serves); under mpirun, take the "
            "mpirun of the MPI that Horovod was built with; or choose comm.backend=torch. "
            f"Found here: rank {launch.rank}, local rank {launch.local_rank}"
        )
    return comm
