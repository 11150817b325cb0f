"""How much memory a rank may take."""

from __future__ import annotations

import platform
from collections import Counter
from pathlib import Path

import torch

from engine.comm.communicator import Communicator

_MEMORY, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def available_bytes(device: torch.device, comm: Communicator) -> int:
    """Free on this rank's GPU; or of this machine and of its control group, a share of each of its ranks. All ranks
    call it together."""
    ranks = Counter(comm.exchange(platform.node()))[platform.node()]
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_bytes() // ranks


def free_bytes(memory: Path = _MEMORY, group: Path = _GROUP) -> int:
    """What this machine has free, or what is left to its control group (a container, a job) where that is less."""
    lines = dict(line.split(":", 1) for line in memory.read_text(encoding="utf-8").splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    for limit, used in _LIMITS:
        if (group / limit).is_file() and (allowed := (group / limit).read_text(encoding="utf-8").strip()).isdecimal():
            free = min(free, int(allowed) - int((group / used).read_text(encoding="utf-8")))
    return max(free, 0)
