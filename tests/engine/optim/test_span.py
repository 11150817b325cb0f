"""Where tensors lie in memory; test_fused.py tests the views of one buffer."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine import compiled
from engine.network import bit
from engine.optim.agc_sgd import AgcSgd
from engine.optim.flat import FlatParameters
from engine.optim.span import zeros
from engine.optim.standardized import StandardizedWeights
from tests.conftest import ROOT

CPU = torch.device("cpu")
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(tensor):
    """Of the mapping that the tensor's middle lies in, as Linux tells it."""
    address, found = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif found and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"{address:x} is not mapped")


def look_at_all():
    """For a process of its own: memory that was used before keeps its small pages."""
    assert huge_bytes(zeros(64 << 20, CPU, torch.uint8)) >= 32 << 20
    assert compiled.loaded()
    model = bit.build("R50x1", 10)  # 94 MB of parameters
    flat = FlatParameters(model, channels_last=True)
    copies = StandardizedWeights(model, flat, torch.bfloat16).forward_weights
    flat.grads.zero_()
    optimizer = AgcSgd(model.parameters(), lr=0.1, momentum=0.9, forward_weights=copies)
    optimizer.step()
    kernel = next(p for p in model.parameters() if p.ndim == 4)
    for tensor in (flat.values, flat.grads, optimizer.state[kernel]["momentum_buffer"], copies.copies[kernel]):
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        assert huge_bytes(whole) >= whole.nbytes // 2
    print("all looked at")


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages as Linux has them")
def test_what_a_step_runs_through_lies_on_huge_pages():
    if not SWITCH.exists() or "[never]" in SWITCH.read_text():
        pytest.skip("this system has no transparent huge pages")
    if not compiled.loaded():
        pytest.skip("engine._C is not built: python setup.py build_ext --inplace")
    call = "from tests.engine.optim import test_span; test_span.look_at_all()"
    ran = subprocess.run([sys.executable, "-c", call], cwd=ROOT, text=True, capture_output=True)
    assert (ran.returncode, ran.stdout) == (0, "all looked at\n"), ran.stderr


@pytest.mark.parametrize("numel", [0, 1, 1000, (4 << 20) + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_zeros(numel, dtype):
    dirty = torch.ones(numel, dtype=dtype)
    del dirty
    found = zeros(numel, CPU, dtype)
    assert found.shape == (numel,) and found.dtype == dtype and not found.any()


def test_fake_tensors_have_none():
    with FakeTensorMode():
        model = nn.Linear(2048, 2048)
        flat = FlatParameters(model, channels_last=True)
        assert zeros(64 << 20, CPU).shape == (64 << 20,)
    assert flat.values.shape == (2048 * 2049,)
