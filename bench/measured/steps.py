"""Launch steps of a given number of ranks from a program that may itself have been launched."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping

from engine.comm.launch import detect_launch, variable
from loaders.errors import UserError

# What a launcher tells its tasks: a step that a task starts must not take it for its own.
_OF_A_TASK = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL", "HOROVOD_CROSS",
              "HOROVOD_GLOO", "HOROVOD_CONTROLLER", "HOROVOD_CPU", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP",
              "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_TASKS_PER_NODE", "SLURM_PMIX", "SLURM_DISTRIBUTION",
              "SLURM_NNODES", "SLURM_CPU_BIND", "SLURM_GTIDS")  # fmt: skip
_SETTINGS = ("OMPI_MCA_", "OMPI_ALLOW", "PMIX_MCA_", "PRTE_MCA_")  # a user's, not a launcher's
_OF_A_LAUNCHER = ("OMPI_MCA_ess", "OMPI_MCA_orte", "PMIX_MCA_mca_base_component_show_load_errors")


def tasks(env: Mapping[str, str] = os.environ) -> int:
    """How many ranks a step may have here; 0 outside of any launcher and allocation."""
    launch = detect_launch(env)
    if not launch.alone:
        return launch.size
    if "SLURM_JOB_ID" in env:
        return variable(env, "SLURM_NTASKS", 0) or _by_node(env)
    return 0


def _by_node(env: Mapping[str, str]) -> int:
    return variable(env, "SLURM_JOB_NUM_NODES", 1) * _fullest(env.get("SLURM_NTASKS_PER_NODE", ""))


def environment(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`env` without what a launcher said to this very task; in a batch script, `env` as it is."""
    if detect_launch(env).alone:
        return dict(env)
    return {
        key: value
        for key, value in env.items()
        if not key.startswith(_OF_A_TASK) or (key.startswith(_SETTINGS) and not key.startswith(_OF_A_LAUNCHER))
    }


def command(ranks: int, env: Mapping[str, str] = os.environ) -> list[str]:
    """The words before `-m MODULE` that start `ranks` ranks: srun in an allocation, else mpirun and its like."""
    if "SLURM_JOB_ID" in env and shutil.which("srun"):
        each = _per_node(env)
        nodes = -(-ranks // each)
        # --overlap: beside the step that this program may itself run in.
        words = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={ranks}"]
        if cpus := env.get("SRUN_CPUS_PER_TASK") or env.get("SLURM_CPUS_PER_TASK"):
            words.append(f"--cpus-per-task={cpus}")
        return [*words, sys.executable]
    if ranks == 1:
        return [sys.executable]
    from engine.comm.mpirun import rank_command  # asks whether Horovod loads, which brings torch

    return rank_command(ranks)


def _per_node(env: Mapping[str, str]) -> int:
    """Tasks on the fullest node of the allocation: "4(x2),3" → 4."""
    return _fullest(env.get("SLURM_NTASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", ""))


def _fullest(words: str) -> int:
    """The largest of Slurm's counts for each node, such as 4(x2),3; 1 where there are none."""
    found = [re.fullmatch(r"([0-9]+)(?:\(x[0-9]+\))?", word) for word in words.split(",")] if words.strip() else []
    if None in found:
        raise UserError(f"{words!r} in the environment is no list of tasks for each node, such as 4(x2),3; unset it")
    return max((int(word[1]) for word in found if word), default=1)
