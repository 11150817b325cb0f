"""The CUDA file compiles for the GPUs that are meant, without spilling registers."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def find_nvcc():
    spec = importlib.util.spec_from_file_location("boosterbit_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.find_nvcc(os.environ)


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_compiles_without_spills_or_stack(architecture, tmp_path):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on this machine: the CUDA kernel was not compiled")
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    words = [nvcc, "-O3", "-std=c++17", "-Xptxas", "-v", "-gencode", target, "-c", "csrc/agc_sgd/cuda.cu"]
    done = subprocess.run([*words, "-o", tmp_path / "kernel.o"], cwd=ROOT, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    entries = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", report)
    # four kinds of gradients, for flat storage and for lists of tensors
    assert len(entries) == 8
    assert {sm for _, sm in entries} == {architecture}
    pattern = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    assert re.findall(pattern, report) == [("0", "0", "0")] * 8, report
    # 16 warps of 32 threads share 65,536 registers
    assert all(int(count) <= 128 for count in re.findall(r"Used (\d+) registers", report))
