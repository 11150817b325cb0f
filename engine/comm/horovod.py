"""Ranks that talk through Horovod: over MPI, Gloo, or NCCL."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
from typing import TYPE_CHECKING, Any

from engine.comm.communicator import Communicator, Handle
from engine.comm.launch import Launch

if TYPE_CHECKING:
    import numpy as np
    import torch


class HorovodCommunicator(Communicator):
    """Horovod over MPI, Gloo, or NCCL, as it was built and launched."""

    name = "horovod"
    sums_bfloat16 = False  # "Tensor type torch.BFloat16Tensor is not supported"

    # Libraries are imported where ranks talk: command lines ask this module only what is installed.

    def __init__(self, launch: Launch) -> None:
        import horovod.torch as hvd
        import torch

        super().__init__(launch)
        self._hvd = hvd
        # Without it `synchronize` makes the host stand until the all-reduce has ended on the device: 2 to 10 ms a step
        # where gradients are large, by estimate. With it, the default stream waits in the host's place.
        os.environ.setdefault("HOROVOD_ENABLE_ASYNC_COMPLETION", "1")
        hvd.init()
        self.rank, self.size, self.local_rank = hvd.rank(), hvd.size(), hvd.local_rank()
        transport = "MPI" if hvd.mpi_enabled() else "Gloo"
        self.name = f"horovod ({transport}{' + NCCL' if hvd.nccl_built() and torch.cuda.is_available() else ''})"

    def start_sum_(self, tensor: torch.Tensor, name: str) -> Handle:
        if tensor.is_cuda:
            import torch

            # Horovod's thread lets the default stream wait for NCCL's: work on another stream would not see the sum.
            assert torch.cuda.current_stream(tensor.device) == torch.cuda.default_stream(tensor.device), (
                "Horovod's collectives are ordered on the default stream only"
            )
        handle = self._hvd.allreduce_async_(tensor, name=name, op=self._hvd.Sum)
        return _HorovodHandle(self._hvd, handle)

    def swap(self, tensor: torch.Tensor, received: torch.Tensor, peer: int, name: str) -> None:
        import torch

        # Horovod has no message from one rank to another, but one to all may be empty for all but one.
        splits = torch.zeros(self.size, dtype=torch.int32)
        splits[peer] = tensor.numel()
        received.copy_(self._hvd.alltoall(tensor, splits, name=name)[0])

    def broadcast_(self, tensor: torch.Tensor, name: str = "broadcast", root: int = 0) -> None:
        self._hvd.broadcast_(tensor, root_rank=root, name=name)

    def gather(self, array: np.ndarray, name: str = "gather") -> np.ndarray:
        import numpy as np
        import torch

        return self._hvd.allgather(torch.from_numpy(np.ascontiguousarray(array)), name=name).numpy()

    def exchange(self, value: Any) -> list[Any]:
        import torch

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


def has_horovod() -> bool:
    """Whether Horovod for torch is installed and loads."""
    if importlib.util.find_spec("horovod") is None:
        return False
    try:
        import horovod.torch  # noqa: F401
    except (ImportError, OSError):  # built for another torch or MPI: as good as absent
        return False
    return True


def horovod_has_nccl() -> bool:
    """Whether Horovod is there and was built with NCCL; without, tensors on a GPU go through the host."""
    if not has_horovod():
        return False
    import horovod.torch as hvd

    return bool(hvd.nccl_built())


def horovod_speaks_mpi() -> bool:
    """Whether Horovod is there and was built with MPI; without, it has Gloo."""
    if not has_horovod():
        return False
    import horovod.torch as hvd

    return hvd.mpi_built()
