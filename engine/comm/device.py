"""Which device a rank computes on, and that no two ranks of a host share a GPU."""

from __future__ import annotations

import os
import socket

import torch

from engine.comm.communicator import Communicator, SharedError
from loaders.errors import UserError


def choose_device(wanted: str, comm: Communicator) -> torch.device:
    """This rank's device: the one GPU that it sees, else the GPU of its local rank, or the CPU.

    UserError where there is none for it.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: no usable GPU is visible to this process; choose cpu, or check the job's GPUs")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # A launcher may show each task a GPU of its own, which then is number 0. That it is not the same one for all is
    # asked in `refuse_shared_gpus`, when the ranks can talk.
    index = 0 if count == 1 else comm.local_rank
    if index >= count:
        raise UserError(
            f"local rank {comm.local_rank} has no GPU: {count} are visible to it "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); start as many tasks per node "
            "as there are GPUs (--ntasks-per-node), or let each task see one GPU of its own (--gpus-per-task=1)"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def refuse_shared_gpus(device: torch.device, comm: Communicator) -> None:
    """SharedError on all ranks, which call this together, where two of one host compute on the same GPU."""
    mine = None
    if device.type == "cuda":
        mine = socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)
    taken: dict[tuple[str, str], int] = {}
    for rank, place in enumerate(comm.exchange(mine)):
        if place is None:
            continue
        if place in taken:
            host, uuid = place
            raise SharedError(
                f"ranks {taken[place]} and {rank} compute on the same GPU of {host} ({uuid}): each would have half of "
                "it. Let each task see a GPU of its own (srun --gpus-per-task=1), or all tasks all of them "
                "(export CUDA_VISIBLE_DEVICES=0,1,2,3 before srun)"
            )
        taken[place] = rank
