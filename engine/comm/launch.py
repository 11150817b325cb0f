"""Which launcher started this process, and how many tasks it started: read from the environment alone."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """One task among those that a launcher started."""

    by: str  # "horovodrun", "torchrun", "Open MPI", "PMI", "Slurm", or "alone"
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # index among the tasks on this node

    @property
    def alone(self) -> bool:
        return self.size == 1


# The innermost launcher wins: inside a Slurm allocation `mpirun` may start the tasks, inside that `torchrun`.
# Slurm counts only inside a step (SLURM_STEP_NUM_TASKS): a batch script or a login shell of an allocation has
# SLURM_NTASKS as well, and yet a program started there is alone.
_LAUNCHERS = (
    ("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK"),
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


def detect_launch(env: Mapping[str, str] = os.environ) -> Launch:
    """The launch found in `env`; a process that nothing launched is `Launch("alone")`."""
    for by, rank, size, local_rank in _LAUNCHERS:
        if rank in env and size in env:
            return Launch(by, int(env[rank]), int(env[size]), int(env.get(local_rank, 0)))
    return Launch("alone")


def rendezvous(launch: Launch, env: Mapping[str, str] = os.environ) -> tuple[str, int] | None:
    """Address and port where the ranks of torch.distributed meet; None where only the user can know.

    torchrun says it. Slurm's first node serves otherwise, and one host serves itself. The port is drawn from the
    identity of the job step, so that two jobs on one node do not meet.
    """
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        return env["MASTER_ADDR"], int(env["MASTER_PORT"])
    identity = "-".join(env.get(key, "") for key in ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE"))
    port = int(env.get("MASTER_PORT", 20000 + zlib.crc32(identity.encode()) % 12000))
    if "MASTER_ADDR" in env:
        return env["MASTER_ADDR"], port
    if env.get("SLURM_LAUNCH_NODE_IPADDR") and launch.by == "Slurm":
        first = _first_host(env.get("SLURM_STEP_NODELIST", ""))
        return (first or env["SLURM_LAUNCH_NODE_IPADDR"]), port
    if env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(launch.size):
        return "127.0.0.1", port
    return None


def _first_host(nodes: str) -> str:
    """First host of a Slurm node list: "n[003-005,9],m1" → "n003"."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    index = rest.split("]")[0].split(",")[0].split("-")[0]
    return head + index + rest.partition("]")[2].split(",")[0]
