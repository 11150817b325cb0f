import os
import sys

import pytest

from tests.cluster import slurm

CPUS = 2  # of each node, whatever the host has: nodes share it


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A running Slurm cluster of two nodes. CI sets BOOSTERBIT_NEED_SLURM: there its absence is a failure."""
    if reason := slurm.missing():
        if os.environ.get("BOOSTERBIT_NEED_SLURM"):
            pytest.fail(f"BOOSTERBIT_NEED_SLURM is set, but {reason}")
        pytest.skip(f"{reason} (Debian: slurm-wlm munge libpmix-dev)")
    with slurm.Cluster(tmp_path_factory.mktemp("slurm"), CPUS) as running:
        running.env |= {"VENV": sys.prefix, "RUNS": str(running.folder / "runs")}
        yield running
