"""CUDA kernels compiled for the CPU, with the emulated GPU of tests/csrc/emulator.h."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
DTYPES = {None: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


class Launch(ctypes.Structure):
    """As in tests/csrc/emulated_agc.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("units", "hyper", "grad_scale", "found_inf")),
        *((name, ctypes.c_int) for name in ("grad", "copy")),
        *((name, ctypes.c_void_p) for name in ("arrays", "classes", "clipped")),
        *((name, ctypes.c_int) for name in ("blocks", "seed", "most_warps")),
    ]

    @classmethod
    def of(
        cls, params, grads, states, copies, table, hyper, *, amp=(None, None), clipped=None, blocks=3, seed=0, most=16
    ):
        """Of tensors, lists of them for each state, and counters or None."""

        def pointers(tensors):
            return [t.data_ptr() for t in tensors] or [0] * len(params)

        arrays = np.array([pointers(x) for x in (params, grads, *states, copies)], dtype=np.int64).T.copy()
        classes = np.array(table.classes, dtype=np.int64)
        flags = [None if x is None else x.data_ptr() for x in (*amp, clipped)]
        grad, copy = (DTYPES[x[0].dtype if len(x) else None] for x in (grads, copies))
        launch = cls(table.units.data_ptr(), hyper.data_ptr(), *flags[:2], grad, copy, arrays.ctypes.data,
                     classes.ctypes.data, flags[2], blocks, seed, most)  # fmt: skip
        launch.alive = arrays, classes
        return launch


def emulated(family, folder):
    """The library of tests/csrc/emulated_FAMILY.cpp, compiled into `folder`."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler {compiler}")
    library = folder / f"{family}.so"
    includes = [f"-I{path}" for path in [ROOT / "csrc", *include_paths()]]
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno"]
    source = ROOT / "tests" / "csrc" / f"emulated_{family}.cpp"
    subprocess.run([compiler, *flags, *includes, source, "-o", library], check=True)
    return ctypes.CDLL(str(library))
