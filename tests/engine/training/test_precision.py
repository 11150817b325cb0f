"""What a process is set up with."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

TAKES_AND_FREES = """
import resource
import torch
from engine.training.precision import Precision
if {prepared}:
    Precision("fp32", torch.device("cpu")).prepare()
def step():
    kept = [torch.empty(16 << 20, dtype=torch.uint8).fill_(1) for _ in range(4)]
    del kept
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's switches")
def test_steps_on_the_cpu_use_the_memory_of_the_steps_before_them():
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}  # as glibc begins; it may learn better, or not
    faults = [
        int(subprocess.run([sys.executable, "-c", TAKES_AND_FREES.format(prepared=prepared)], cwd=ROOT, env=env,
                           text=True, capture_output=True, check=True).stdout)
        for prepared in (False, True)
    ]  # fmt: skip
    assert faults[1] < 100 < faults[0]  # a step of 64 MiB has 16,384 pages of 4 KiB, or 32 of 2 MiB
