"""The CUDA files compile for the GPUs that are meant, without spilling registers."""

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


# AGC-SGD: four kinds of gradients, for flat storage and for lists of tensors. AdamW: three kinds of gradients, and the
# count of steps; with an average and without. Group norm: forward and backward, three dtypes, vectors and elements, two
# layouts; and the parameters' gradients.
KERNELS = [("agc_sgd", 4 * 2), ("agc_adamw", (3 * 2 + 1) * 2), ("group_norm", 2 * 3 * 2 * 2 + 1)]


@pytest.mark.parametrize(("family", "kernels"), KERNELS)
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_compiles_without_spills_or_stack(family, kernels, architecture, tmp_path):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on this machine: the CUDA kernel was not compiled")
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    words = [nvcc, "-O3", "-std=c++17", "-Xptxas", "-v", "-gencode", target, "-c", f"csrc/{family}/cuda.cu"]
    done = subprocess.run([*words, "-o", tmp_path / "kernel.o"], cwd=ROOT, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    entries = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", report)
    assert len(entries) == kernels
    assert {sm for _, sm in entries} == {architecture}
    pattern = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    assert re.findall(pattern, report) == [("0", "0", "0")] * kernels, report
    # 16 warps of 32 threads share 65,536 registers
    assert all(int(count) <= 128 for count in re.findall(r"Used (\d+) registers", report))
