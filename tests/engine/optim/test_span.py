"""Where tensors lie in memory; test_fused.py tests the views of one buffer."""

import re
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

CPU = torch.device("cpu")
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def asked_for_huge_pages(tensor):
    """Whether Linux was asked for them where the tensor's middle lies; whether it had any is another matter."""
    address, found = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif found and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"{address:x} is not mapped")


@pytest.mark.skipif(not SWITCH.exists(), reason="this system has no transparent huge pages")
def test_what_a_step_runs_through_lies_on_huge_pages():
    assert asked_for_huge_pages(zeros(64 << 20, CPU, torch.uint8))
    if not compiled.loaded():
        pytest.skip("engine._C is not built: python setup.py build_ext --inplace")
    model = bit.build("R50x1", 10)  # 94 MB of parameters
    flat = FlatParameters(model, channels_last=True)
    copies = StandardizedWeights(model, flat, torch.bfloat16).forward_weights
    flat.grads.zero_()
    optimizer = AgcSgd(model.parameters(), lr=0.1, momentum=0.9, forward_weights=copies)
    optimizer.step()
    kernel = next(p for p in model.parameters() if p.ndim == 4)
    for tensor in (flat.values, flat.grads, optimizer.state[kernel]["momentum_buffer"], copies.copies[kernel]):
        assert asked_for_huge_pages(torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()))


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
