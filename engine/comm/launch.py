"""Which launcher started this process, and how many tasks it started: read from the environment alone."""

from __future__ import annotations

import itertools
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loaders.errors import UserError


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


_ENTRY = re.compile(r"(?:[^,\[\]]|\[[^\]]*\]?|\])+")  # between commas that are in no bracket
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")

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
    """The launch found in `env`; a process that nothing launched is `Launch("alone")`. What is empty is absent.

    UserError for what is no number, and for a rank that is not below the number of tasks.
    """
    for by, rank, size, local_rank in _LAUNCHERS:
        if _given(env, rank) and _given(env, size):
            launch = Launch(by, variable(env, rank), variable(env, size), variable(env, local_rank, 0))
            if launch.rank >= launch.size:
                raise UserError(f"{rank}={launch.rank} with {size}={launch.size}; ranks go from 0 to {size} - 1")
            return launch
    return Launch("alone")


def _given(env: Mapping[str, str], key: str) -> str:
    return env.get(key, "").strip()


def variable(env: Mapping[str, str], key: str, default: int | None = None) -> int:
    """The whole number of a variable; `default` where it is empty or absent. UserError for what is none."""
    text = _given(env, key)
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{key}={text} in the environment is no whole number; unset it, or let the launcher set it")
    return int(text)


def rendezvous(launch: Launch, env: Mapping[str, str] = os.environ) -> tuple[str, int] | None:
    """Address and port where the ranks of torch.distributed meet; None where only the user can know.

    torchrun says it. Slurm's first node serves otherwise, and one host serves itself. The port is drawn from the
    identity of the job step, so that two jobs on one node do not meet.
    """
    identity = "-".join(env.get(key, "") for key in ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE"))
    port = variable(env, "MASTER_PORT", 20000 + zlib.crc32(identity.encode()) % 12000)
    if not 0 < port < 65536:
        raise UserError(f"MASTER_PORT={port} is no port; 1 to 65535 are")
    if address := _given(env, "MASTER_ADDR"):
        return address.removeprefix("[").removesuffix("]"), port
    if _given(env, "SLURM_LAUNCH_NODE_IPADDR") and launch.by == "Slurm":
        first = next(expand_hosts(env.get("SLURM_STEP_NODELIST", "")), None)
        return (first or _given(env, "SLURM_LAUNCH_NODE_IPADDR")), port
    if _given(env, "OMPI_COMM_WORLD_LOCAL_SIZE") == str(launch.size):
        return "127.0.0.1", port
    return None


def url(address: str, port: int) -> str:
    """The two as `tcp://…`, with an IPv6 address in brackets."""
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def expand_hosts(nodes: str) -> Iterator[str]:
    """The hosts of a Slurm node list, as `scontrol show hostnames` prints them: "r[1-2]n[01-02],m1" → r1n01 … m1.

    The last bracket runs fastest. UserError for a list that is none.
    """
    for entry in _ENTRY.findall(nodes):
        parts = _BRACKET.split(entry)  # text, ranges, text, ranges, …, text
        if any(sign in text for text in parts[::2] for sign in "[]"):
            raise UserError(f"the node list {nodes!r} has brackets that do not match")
        choices = [[part] if k % 2 == 0 else list(_indices(part, nodes)) for k, part in enumerate(parts)]
        for chosen in itertools.product(*choices):
            yield "".join(chosen)


def _indices(ranges: str, nodes: str) -> Iterator[str]:
    """ "003-005,9" → 003, 004, 005, 9."""
    for each in ranges.split(","):
        found = _RANGE.fullmatch(each)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise UserError(f"the node list {nodes!r} has a range {each!r} that is none")
        for number in range(int(found[1]), int(found[2] or found[1]) + 1):
            yield f"{number:0{len(found[1])}d}"
