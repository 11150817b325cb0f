"""The CPU operator compiled for each kind of processor that it is cloned for: all write the same bits."""

import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from engine import compiled
from engine.optim import ops
from tests.support.agc_cases import ROWS, SETTINGS, Bag, gradients

pytestmark = [
    pytest.mark.skipif(not compiled.loaded(), reason="engine._C is not built: python setup.py build_ext --inplace"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="there are clones on x86-64 only"),
]
ROOT = Path(__file__).parents[2]
DTYPES = {None: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
KINDS = {"default": "-march=x86-64", "avx2": "-mavx2", "avx512": "-march=x86-64-v4"}
NEEDS = {"default": set(), "avx2": {"avx2"}, "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}}
SHAPES = [(3, n) for n in ROWS] + [(40, 147), (25000,), (40000,), (7,), ()]
EPS = 1e-10


@pytest.fixture(scope="module")
def clones(tmp_path_factory):
    """Kind of processor → the operator compiled for it, as setup.py does; those that this processor can run."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler {compiler}")
    flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    kinds = [kind for kind, needs in NEEDS.items() if needs <= flags]
    if len(kinds) == 1:
        pytest.skip("this processor has neither AVX2 nor AVX-512: one clone only")
    folder = tmp_path_factory.mktemp("clones")
    options = ["-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off"]
    includes = [f"-I{path}" for path in [ROOT / "csrc", *include_paths()]]
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    source = ROOT / "tests" / "csrc" / "cpu_clone.cpp"
    running = [
        subprocess.Popen([compiler, *options, KINDS[kind], *includes, source, "-o", folder / kind, *libraries])
        for kind in kinds
    ]
    assert [process.wait() for process in running] == [0] * len(kinds)
    return {kind: ctypes.CDLL(str(folder / kind)).step for kind in kinds}


def case(dtype, copy_dtype, eps):
    """Parameters, gradients, momenta, copies. Some rows have a mean that their variance all but cancels against, so
    that another order of the sums shows in every element that is written."""
    params = [p.detach().clone() for p in Bag(SHAPES, seed=3).parameters()]
    for p in params:
        if eps is not None and p.ndim > 1:
            p[-1].mul_(1e-3).add_(1e4)
    grads = [g.to(dtype) for g in gradients(params, 1)]
    copies = [] if copy_dtype is None else [torch.zeros_like(p, dtype=copy_dtype) for p in params]
    return params, grads, [torch.randn_like(p) for p in params], copies


@pytest.mark.parametrize("eps", [None, EPS], ids=["plain", "standardized"])
@pytest.mark.parametrize("copy_dtype", [None, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_clones_and_the_operator_write_the_same_bits(clones, dtype, copy_dtype, eps):
    hyper = torch.tensor([ops.hyper_row(SETTINGS), ops.hyper_row(SETTINGS, eps)])
    table = ops.unit_table([ops.Region(s, 0, int(len(s) > 1), i) for i, s in enumerate(SHAPES)])
    lr = torch.tensor([0.1])
    torch.manual_seed(0)
    start = case(dtype, copy_dtype, eps)
    params, grads, momenta, copies = ([x.clone() for x in tensors] for tensors in start)
    torch.ops.boosterbit.agc_sgd_list_(params, grads, momenta, table.units, table.classes, lr, hyper, copies=copies)
    expected = [*params, *momenta, *copies]
    assert all(x.isfinite().all() for x in (*params, *momenta))
    for kind, step in clones.items():
        mine = [[x.clone() for x in tensors] for tensors in start]
        pointers = [[x.data_ptr() for x in tensors] or [0] * len(SHAPES) for tensors in mine]
        arrays = np.array(pointers, dtype=np.int64).T.copy()
        address = [ctypes.c_void_p(x.data_ptr()) for x in (table.units, lr, hyper)]
        count = ctypes.c_int64(len(table.units))
        step(address[0], count, *address[1:], DTYPES[dtype], DTYPES[copy_dtype], ctypes.c_void_p(arrays.ctypes.data))
        for found, wanted in zip([*mine[0], *mine[2], *mine[3]], expected, strict=True):
            assert torch.equal(found, wanted), (kind, tuple(wanted.shape))
