"""The CUDA kernels of group norm with ReLU, run on a CPU thread by thread, against the float64 oracle."""

import ctypes

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bench.measured.norm import shapes as shapes_of
from tests.support.emulated import emulated
from tests.support.norm_cases import CHANNELS_LAST, DTYPES, SHAPES, agrees, case, exact, shortcut_of, with_shortcut

NAMES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": CHANNELS_LAST}
# Multiprocessors, bytes of shared memory for a block and for a multiprocessor.
A100, H100 = (108, 166_912, 167_936), (132, 232_448, 233_472)
SMALL = (1, 166_912, 167_936)
"""So small that tiles become wide, and nothing is split."""
FULL = (1, 49_152, 50_176)
"""With little shared memory: much is read twice."""
PLAN = ("wide", "groups", "lanes", "side", "warps", "kept", "parts", "rows", "shared", "tiles", "keeps_all")
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def numbers(values):
    return (ctypes.c_int64 * len(values))(*values)


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def shape_row(shape, groups, dtype, channels_last):
    return numbers([*shape[:2], int(np.prod(shape[2:])), groups, int(channels_last), NAMES[dtype]])


def bordered(like, shift=0):
    """A tensor like another, unwritten, `shift` elements past a multiple of 64 bytes, and what lies around it."""
    room = torch.full((like.numel() + 256,), 7.0, dtype=like.dtype)
    begin = -room.data_ptr() % 64 // like.element_size() + 64 + shift
    inner = room[begin : begin + like.numel()]
    inner.fill_(torch.nan)
    return inner.as_strided(like.shape, like.stride(), begin), room


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    found = emulated("group_norm", tmp_path_factory.mktemp("emulated"))
    found.forward.restype = found.backward.restype = ctypes.c_char_p
    return found


@pytest.fixture
def gpu(library):
    """gpu(x, weight, bias, grad, groups) → output, the three gradients, mean, 1/σ; as from a device of this kind."""

    def call(x, weight, bias, grad, groups, eps=1e-5, device=SMALL, blocks=3, seed=0, shift=0, shortcut=None):
        channels_last = x.ndim == 4 and x.is_contiguous(memory_format=CHANNELS_LAST)
        layout = CHANNELS_LAST if channels_last else torch.contiguous_format
        assert x.is_contiguous(memory_format=layout)
        row = shape_row(x.shape, groups, x.dtype, channels_last), numbers(device)
        around = [bordered(x, shift) for _ in range(5)]
        x_, g_, y, dx, more = (inner for inner, _ in around)
        x_.copy_(x)
        g_.copy_(grad)
        if shortcut is not None:
            more.copy_(shortcut)
        mean, inverse = (torch.full((x.shape[0], groups), torch.nan) for _ in range(2))
        dweight, dbias = (torch.full_like(weight, torch.nan) for _ in range(2))
        statistics, run = [pointer(mean), pointer(inverse)], [blocks, seed]
        parameters = [pointer(weight), pointer(bias)]
        error = library.forward(*row, pointer(x_), *parameters, ctypes.c_double(eps), pointer(y), *statistics, *run)
        assert error is None, error
        found = [None if shortcut is None else pointer(more), *(pointer(t) for t in (dx, dweight, dbias))]
        error = library.backward(*row, pointer(g_), pointer(x_), *parameters, *statistics, *found, *run)
        assert error is None, error
        for inner, room in around:
            begin = inner.storage_offset()
            assert (room[:begin] == 7).all() and (room[begin + inner.numel() :] == 7).all(), "written outside"
        return [y, dx, dweight, dbias, mean, inverse]

    return call


@pytest.fixture
def plan(library):
    """plan(shape, groups, dtype, device, arrays=…) → the plan for aligned channels-last activations, by name."""

    def call(shape, groups, dtype, device, arrays=1, channels_last=True):
        found = numbers([0] * len(PLAN))
        library.plan(shape_row(shape, groups, dtype, channels_last), numbers(device), 1, arrays, found)
        return dict(zip(PLAN, found, strict=True))

    return call


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_agrees_with_float64(gpu, shape, groups, dtype, layout):
    arguments = case(shape, dtype, layout)
    found = gpu(*arguments, groups)
    agrees(found[:4], exact(*arguments, groups), [DTYPES[dtype]] * 2 + [4e-6] * 2)


@layouts
def test_random_shapes(gpu, layout):
    generator = torch.Generator().manual_seed(2)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    for seed in range(24):
        groups = number(1, 9)
        shape = (number(1, 4), groups * number(1, 40), number(1, 12), number(1, 12))
        dtype = list(DTYPES)[seed % 3]
        arguments = case(shape, dtype, layout, mean=number(-3, 4), seed=seed)
        shortcut, right = shortcut_of(arguments[3]), exact(*arguments, groups)
        if seed % 4 < 2:
            shortcut = None
        else:
            right = with_shortcut(right, shortcut)
        device = [SMALL, FULL, A100][seed % 3]
        found = gpu(*arguments, groups, device=device, seed=seed, shift=seed % 2, shortcut=shortcut)
        agrees(found[:4], right, [2 * DTYPES[dtype]] * 2 + [2e-5] * 2)


@layouts
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_share_a_tile(gpu, plan, dtype, layout):
    """Few tiles and many multiprocessors: parts of unequal length, two launches."""
    shape, groups = (2, 32, 70, 61), 4
    arguments = case(shape, dtype, layout, mean=5.0)
    for arrays in (1, 2):
        assert plan(shape, groups, dtype, A100, arrays, layout is CHANNELS_LAST)["parts"] > 2
    shortcut = shortcut_of(arguments[3])
    found = gpu(*arguments, groups, device=A100, blocks=7, shortcut=shortcut)
    agrees(found[:4], with_shortcut(exact(*arguments, groups), shortcut), [2 * DTYPES[dtype]] * 2 + [2e-5] * 2)


@layouts
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_that_do_not_fit_on_chip(gpu, plan, dtype, layout):
    shape, groups = (1, 32, 70, 61), 2
    arguments = case(shape, dtype, layout, mean=5.0)
    for arrays in (1, 2):
        assert not plan(shape, groups, dtype, FULL, arrays, layout is CHANNELS_LAST)["keeps_all"]
    shortcut = shortcut_of(arguments[3])
    found = gpu(*arguments, groups, device=FULL, blocks=1, shortcut=shortcut)
    agrees(found[:4], with_shortcut(exact(*arguments, groups), shortcut), [2 * DTYPES[dtype]] * 2 + [2e-5] * 2)


@layouts
@pytest.mark.parametrize("shift", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_alignment(gpu, dtype, shift, layout):
    arguments = case((2, 64, 6, 8), dtype, layout)
    found = gpu(*arguments, 8, shift=shift)
    agrees(found[:4], exact(*arguments, 8), [DTYPES[dtype]] * 2 + [4e-6] * 2)


@layouts
@pytest.mark.parametrize("device", [SMALL, FULL, A100], ids=["whole", "twice", "split"])
@pytest.mark.parametrize("first", [1.0, -3e4], ids=["even", "outlier_first"])
def test_a_large_mean_cancels_nothing(gpu, layout, first, device):
    """Mean 1e4, deviation 1: with E x² - (E x)² in float32 nothing would be left of the variance, 1e8 being 2^27."""
    x, weight, bias, grad = case((1, 32, 63, 39), torch.float32, layout, mean=1e4)
    x[0, :, 0, 0] = 1e4 + first
    weight, bias = weight.clamp(-1, 1) * 0.1, bias.sign() * 60  # away from the kink
    found = gpu(x, weight, bias, grad, 4, device=device)
    agrees(found[:4], exact(x, weight, bias, grad, 4), [1e-3, 1e-3, 5e-3, 4e-6])
    rows = x.double().reshape(1, 4, -1)
    assert (found[4] - rows.mean(2)).abs().max() <= 1e-3  # float32's spacing at 1e4
    assert (found[5] * (rows.var(2, unbiased=False) + 1e-5).sqrt() - 1).abs().max() < 1e-6


@layouts
@pytest.mark.parametrize("device", [SMALL, A100], ids=["whole", "split"])
@pytest.mark.parametrize("level", [0.0, 1e-30, 1234.567, -1e30])
def test_constant_groups_give_the_bias(gpu, layout, level, device):
    _, weight, bias, grad = case((1, 8, 70, 61), torch.float32)
    x = torch.full((1, 8, 70, 61), level).contiguous(memory_format=layout)
    found = gpu(x, weight, bias, grad, 2, device=device)
    assert torch.equal(found[0], F.relu(bias)[None, :, None, None].expand_as(x))
    assert all(torch.isfinite(t).all() for t in found)
    assert not found[2].any()


def test_not_a_number_stays_one(gpu):
    x, weight, bias, grad = case((2, 16, 4, 4), torch.bfloat16, CHANNELS_LAST)
    x[1, 2, 0, 0] = torch.nan
    found = gpu(x, weight, bias, grad, 4)
    assert found[0][1, :4].isnan().all()
    assert not found[0][0].isnan().any() and not found[0][1, 4:].isnan().any()


@layouts
@pytest.mark.parametrize("device", [SMALL, FULL, A100], ids=["whole", "twice", "split"])
def test_equal_bits_whatever_the_order(gpu, layout, device):
    """Blocks in any number, threads in any order."""
    arguments = case((2, 48, 40, 33), torch.bfloat16, layout, mean=2.0)
    first, *others = (gpu(*arguments, 6, device=device, blocks=n, seed=n) for n in (1, 2, 5))
    for found in others:
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


@pytest.mark.parametrize(
    ("model", "device", "expected"),
    [("R50x1", H100, 0), ("R152x4", H100, 1), ("R50x1", A100, 3), ("R152x4", A100, 5)],
    ids=["R50x1-H100", "R152x4-H100", "R50x1-A100", "R152x4-A100"],
)
def test_plans_for_the_networks(plan, model, device, expected):
    """Whole sectors, within the device's limits; and one pass over memory for all but the largest maps, which are
    `expected` of the shapes, forward and backward."""
    dtype, batch, twice = torch.bfloat16, 128, 0
    for channels, side in shapes_of(model, 224):
        for arrays in (1, 2):
            found = plan((batch, channels, side, side), 32, dtype, device, arrays)
            width = found["groups"] * channels // 32 * 2
            assert found["wide"] and width % 32 == 0
            assert found["shared"] <= device[1] and found["parts"] == 1
            assert 32 * found["warps"] <= 512
            reach = batch * channels * side * side * 2 // (found["tiles"] * batch) * arrays
            assert found["keeps_all"] or reach > device[1] * 0.85
            twice += not found["keeps_all"]
    assert twice == expected
    # One image: its largest map is spread over the device.
    channels, side = max(shapes_of(model, 224), key=lambda shape: shape[0] * shape[1] ** 2)
    alone = plan((1, channels, side, side), 32, dtype, device)
    assert alone["parts"] * alone["tiles"] >= 64
