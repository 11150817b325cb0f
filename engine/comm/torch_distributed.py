"""Ranks that talk through torch.distributed: NCCL for CUDA tensors, Gloo for the rest."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from engine.comm.communicator import Communicator, Handle
from engine.comm.launch import Launch, rendezvous, url
from loaders.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch


class TorchCommunicator(Communicator):
    """torch.distributed: NCCL for CUDA tensors, Gloo for the rest."""

    name = "torch.distributed"
    sums_in_graphs = True  # NCCL's

    def __init__(self, launch: Launch, patience_s: float | None = None) -> None:
        import torch
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
            init_method=url(address, port) if "TORCHELASTIC_RUN_ID" not in os.environ else "env://",
            rank=launch.rank,
            world_size=launch.size,
            timeout=timedelta(seconds=600 if patience_s is None else patience_s),
        )
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.name = f"torch.distributed ({'NCCL' if torch.cuda.is_available() else 'Gloo'})"

    def start_sum_(self, tensor: torch.Tensor, name: str) -> Handle:
        return self._dist.all_reduce(tensor, async_op=True)

    def swap(self, tensor: torch.Tensor, received: torch.Tensor, peer: int, name: str) -> None:
        dist, pair = self._dist, []
        if tensor.numel():
            pair.append(dist.P2POp(dist.isend, tensor, peer))
        if received.numel():
            pair.append(dist.P2POp(dist.irecv, received, peer))
        for work in dist.batch_isend_irecv(pair) if pair else ():
            work.wait()

    def broadcast_(self, tensor: torch.Tensor, name: str = "broadcast", root: int = 0) -> None:
        self._dist.broadcast(tensor, src=root)

    def gather(self, array: np.ndarray, name: str = "gather") -> np.ndarray:
        import numpy as np
        import torch

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
