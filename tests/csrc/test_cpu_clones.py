"""The CPU operators compiled for each kind of processor, fused multiply-add or not: all write the same bits."""

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from engine import compiled
from engine.optim import ops
from tests.support import norm_cases
from tests.support.agc_cases import ADAMW, ROWS, SETTINGS, Bag, gradients

pytestmark = [
    pytest.mark.skipif(not compiled.loaded(), reason="engine._C is not built: python setup.py build_ext --inplace"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="several kinds are compiled for on x86-64 only"),
]
ROOT = Path(__file__).parents[2]
RUN = """
import sys, torch
from engine import compiled
assert compiled.loaded()
given, tables, norm = torch.load(sys.argv[1])
own = torch.ops.boosterbit
for params, grads, momenta, copies in given:
    own.agc_sgd_list_(params, grads, momenta, *tables, copies=copies)
x, weight, bias, grad = norm
y, mean, inverse = own.group_norm_relu(x, weight, bias, 8, 1e-5)
found = [y, mean, inverse, *own.group_norm_relu_backward(grad, x, weight, bias, mean, inverse, 8, None)]
torch.save([*(t for case in given for ts in case for t in ts), *found], sys.argv[2])
"""
DTYPES = {None: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
KINDS = {"default": "-march=x86-64", "avx2": "-mavx2", "fused": "-march=x86-64-v3", "avx512": "-march=x86-64-v4"}
NEEDS = {"default": set(), "avx2": {"avx2"}, "fused": {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"}}
NEEDS["avx512"] = NEEDS["fused"] | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
SHAPES = [(3, n) for n in ROWS] + [(40, 147), (25000,), (40000,), (7,), ()]
EPS = 1e-10
TAKEN = """
#include "shared/cpu.h"
int bits(boosterbit::Avx512) { return 512; }
int bits(boosterbit::Avx2) { return 256; }
int bits(boosterbit::Baseline) { return 0; }
extern "C" int taken() {
  int found = -1;
  boosterbit::on_this_processor([&](auto processor) { found = bits(processor); });
  return found;
}
"""


def flags():
    """What this processor has, as Linux says it."""
    return set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())


def compiled_for_each(family, folder):
    """Kind of processor → the family's operators compiled for it, as setup.py does; those that this one can run."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler {compiler}")
    kinds = [kind for kind, needs in NEEDS.items() if needs <= flags()]
    if len(kinds) == 1:
        pytest.skip("this processor has neither AVX2 nor AVX-512: one clone only")
    options = ["-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off"]
    options.append("-fno-math-errno")
    includes = [f"-I{path}" for path in [ROOT / "csrc", *include_paths()]]
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    source = ROOT / "tests" / "csrc" / f"{family}_clone.cpp"
    running = [
        subprocess.Popen([compiler, *options, KINDS[kind], *includes, source, "-o", folder / kind, *libraries])
        for kind in kinds
    ]
    assert [process.wait() for process in running] == [0] * len(kinds)
    return {kind: ctypes.CDLL(str(folder / kind)) for kind in kinds}


@pytest.fixture(scope="module")
def clones(tmp_path_factory):
    return {
        kind: library.step for kind, library in compiled_for_each("agc_sgd", tmp_path_factory.mktemp("clones")).items()
    }


@pytest.fixture(scope="module")
def adamw(tmp_path_factory):
    return compiled_for_each("agc_adamw", tmp_path_factory.mktemp("adamw"))


@pytest.fixture(scope="module")
def norms(tmp_path_factory):
    return compiled_for_each("group_norm", tmp_path_factory.mktemp("norms"))


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


@pytest.mark.parametrize("eps", [None, EPS], ids=["plain", "standardized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_clones_of_adamw_and_the_operator_write_the_same_bits(adamw, dtype, eps):
    hyper = torch.tensor([ops.adamw_row(ADAMW), ops.adamw_row(ADAMW, eps)])
    table = ops.unit_table([ops.Region(s, 0, int(len(s) > 1), i) for i, s in enumerate(SHAPES)])
    lr = torch.tensor([0.1])
    torch.manual_seed(0)
    params, grads, momenta, copies = case(dtype, torch.bfloat16, eps)
    start = params, grads, momenta, [m.square() for m in momenta], [p.clone() for p in params], copies

    def clones_of():
        return [[x.clone() for x in tensors] for tensors in start]

    p, g, m, v, ema, c = clones_of()
    tables = table.units, table.classes, lr, hyper, torch.tensor(3.0)
    torch.ops.boosterbit.agc_adamw_list_(p, g, m, v, *tables, emas=ema, copies=c)
    assert all(x.isfinite().all() for x in (*p, *m, *v, *ema))
    for kind, library in adamw.items():
        mine = clones_of()
        arrays = np.array([[x.data_ptr() for x in tensors] for tensors in mine], dtype=np.int64).T.copy()
        address = [ctypes.c_void_p(x.data_ptr()) for x in (table.units, lr, hyper)]
        count, pointers = ctypes.c_int64(len(table.units)), ctypes.c_void_p(arrays.ctypes.data)
        library.step(address[0], count, *address[1:], DTYPES[dtype], DTYPES[torch.bfloat16], pointers)
        for found, wanted in zip(sum(mine, []), sum((p, g, m, v, ema, c), []), strict=True):
            assert torch.equal(found, wanted), (kind, tuple(wanted.shape))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", norm_cases.DTYPES)
@pytest.mark.parametrize("shape", [(2, 96, 33, 29), (3, 40, 7, 7), (1, 24, 150, 3)])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a shortcut"])
def test_all_clones_of_group_norm_and_the_operator_write_the_same_bits(norms, shape, dtype, layout, beside):
    groups, eps = 8, 1e-5
    x, weight, bias, grad = norm_cases.case(shape, dtype, layout, mean=3.0)
    grad = grad.contiguous(memory_format=layout)
    own = torch.ops.boosterbit
    y, mean, inverse = own.group_norm_relu(x, weight, bias, groups, eps)
    shortcut = norm_cases.shortcut_of(grad) if beside else None
    gradients = own.group_norm_relu_backward(grad, x, weight, bias, mean, inverse, groups, shortcut)
    expected = [y, mean, inverse, *gradients]
    row = [*shape[:2], shape[2] * shape[3], groups, int(layout is torch.channels_last), DTYPES[dtype]]
    for kind, library in norms.items():
        found = [torch.full_like(t, torch.nan) for t in expected]
        inputs, outputs = ([ctypes.c_void_p(t.data_ptr()) for t in ts] for ts in ((x, weight, bias), found))
        numbers = (ctypes.c_int64 * len(row))(*row)
        library.forward(numbers, *inputs, ctypes.c_double(eps), *outputs[:3])
        parts = torch.empty(2 * shape[0] * shape[1])
        more = ctypes.c_void_p(shortcut.data_ptr() if beside else 0)
        given = ctypes.c_void_p(grad.data_ptr()), *inputs, *outputs[1:3], more, outputs[3]
        library.backward(numbers, *given, ctypes.c_void_p(parts.data_ptr()), *outputs[4:])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), kind


def test_what_the_module_has_for_each_processor_writes_the_same_bits(tmp_path):
    """The clones above are built for one processor each; here the module itself is told which to take."""
    hyper = torch.tensor([ops.hyper_row(SETTINGS), ops.hyper_row(SETTINGS, EPS)])
    table = ops.unit_table([ops.Region(s, 0, int(len(s) > 1), i) for i, s in enumerate(SHAPES)])
    given = [case(dtype, copy, EPS) for dtype in list(DTYPES)[1:] for copy in list(DTYPES)[1:]]
    norm = norm_cases.case((3, 40, 7, 7), torch.bfloat16, torch.channels_last, mean=3.0)
    tensors = [tuple([t.detach() for t in ts] for ts in one) for one in given]
    torch.save((tensors, (table.units, table.classes, torch.tensor([0.1]), hyper), norm), tmp_path / "given")
    found = {}
    for kind in ("avx512", "avx2", "default"):
        command = [sys.executable, "-c", RUN, tmp_path / "given", tmp_path / kind]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"ATEN_CPU_CAPABILITY": kind}, check=True)
        found[kind] = torch.load(tmp_path / kind)
    for kind in ("avx512", "avx2"):
        assert all(torch.equal(a, b) for a, b in zip(found[kind], found["default"], strict=True)), kind


@pytest.mark.parametrize(("processor", "vector"), [("avx2", "ymm"), ("avx512", "zmm")])
def test_each_kind_of_processor_has_whole_vectors(processor, vector):
    """A condition in a loop may leave it to single elements for one kind alone: the same bits, and a quarter of the
    speed. Half floats of 16 bits are such still: plain x86-64 and AVX2 have no vectors of them. Sums of products of
    doubles are fused, and copies of the parameters written past the cache."""
    if shutil.which("objdump") is None:
        pytest.skip("no objdump on this machine")
    library = importlib.util.find_spec("engine._C").origin
    listing = subprocess.run(["objdump", "-dC", "--no-show-raw-insn", library], capture_output=True, text=True).stdout
    packed = {}
    for function in listing.split("\n\n"):
        name = function.strip().split(":\n", 1)[0]
        rule = re.search(rf"::on_{processor}<.*?(AgcSgd|AgcAdamW<\w+>|NormForward|NormBackward)", name)
        dtype = re.search(r"<(float|c10::BFloat16)[,>]", name)
        if rule and dtype:
            found = re.findall(rf"\tv(add|sub|mul|sqrt)ps .*{vector}", function)
            packed[rule[1], dtype[1]] = {what: found.count(what) for what in ("add", "sub", "mul", "sqrt")}
            packed[rule[1], dtype[1]]["fused"] = len(re.findall(r"\tvfmadd\d*pd .*[yz]mm", function))
            packed[rule[1], dtype[1]]["past the cache"] = len(re.findall(r"\tv?movnt(?:dq|ps) ", function))
    assert len(packed) == 2 * 5
    for (rule, dtype), counts in packed.items():
        assert min(counts[what] for what in ("add", "sub", "mul")) >= 2, (rule, dtype, counts)
        assert (counts["sqrt"] >= 2) == ("Adam" in rule), (rule, dtype, counts)
        assert (counts["fused"] >= 2) == ("Agc" in rule), (rule, dtype, counts)
        assert (counts["past the cache"] >= 4) == ("Agc" in rule), (rule, dtype, counts)


def test_a_processor_takes_the_code_that_is_made_for_it(tmp_path, monkeypatch):
    """No wider than ATEN_CPU_CAPABILITY allows, as torch's own operators."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler {compiler}")
    source = tmp_path / "taken.cpp"
    source.write_text(TAKEN)
    includes = [f"-I{path}" for path in [ROOT / "csrc", *include_paths()]]
    library = tmp_path / "taken.so"
    subprocess.run([compiler, "-std=c++20", "-shared", "-fPIC", *includes, source, "-o", library], check=True)
    fits = [kind for kind in ("avx512", "fused", "default") if NEEDS[kind] <= flags()]
    widest = {"avx512": 512, "fused": 256, "default": 0}[fits[0]]
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    for wish, most in ((None, 512), ("avx512", 512), ("avx2", 256), ("default", 0), ("vsx", 512)):
        if wish is not None:
            monkeypatch.setenv("ATEN_CPU_CAPABILITY", wish)
        fresh = shutil.copy(library, tmp_path / f"{wish}.so")  # what it read stays with a library that is loaded
        assert ctypes.CDLL(str(fresh)).taken() == min(widest, most), wish
