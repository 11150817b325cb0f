"""The CUDA kernels of group norm with ReLU, on a GPU."""

import pytest
import torch

from engine.network import norm
from tests.support.norm_cases import (
    CHANNELS_LAST,
    DTYPES,
    SHAPES,
    agrees,
    case,
    exact,
    shortcut_of,
    through,
    through_beside,
    with_shortcut,
)

pytestmark = pytest.mark.gpu
LARGE = [((1, 256, 56, 56), 32), ((3, 1024, 61, 60), 32), ((64, 256, 56, 56), 32), ((128, 2048, 7, 7), 32)]
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=["contiguous", "last"])


def ours(arguments, groups):
    return [t.cpu() for t in through(norm.group_norm_relu, *(t.cuda() for t in arguments), groups)]


@layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), SHAPES + LARGE)
def test_agrees_with_float64(shape, groups, dtype, layout):
    arguments = case(shape, dtype, layout)
    assert norm.fits(*(t.cuda() for t in arguments[:3]))
    agrees(ours(arguments, groups), exact(*arguments, groups), [2 * DTYPES[dtype]] * 2 + [2e-5] * 2)


@layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), SHAPES + LARGE)
def test_the_gradient_of_a_shortcut_joins(shape, groups, dtype, layout):
    arguments = case(shape, dtype, layout)
    shortcut = shortcut_of(arguments[3])
    found = [t.cpu() for t in through_beside(*(t.cuda() for t in (*arguments, shortcut)), groups)]
    right = with_shortcut(exact(*arguments, groups), shortcut)
    agrees(found, right, [2 * DTYPES[dtype]] * 2 + [2e-5] * 2)


@layouts
@pytest.mark.parametrize("shape", [(64, 64, 40, 39), (1, 64, 80, 79)], ids=["whole", "split"])
def test_a_large_mean_cancels_nothing(shape, layout):
    x, weight, bias, grad = case(shape, torch.float32, layout, mean=1e4)
    x[0, :, 0, 0] = -2e4
    weight, bias = weight.clamp(-1, 1) * 0.1, bias.sign() * 60
    arguments = x, weight, bias, grad
    agrees(ours(arguments, 32), exact(*arguments, 32), [1e-3, 1e-3, 5e-3, 4e-6])


@layouts
@pytest.mark.parametrize("shape", [(32, 256, 28, 28), (1, 256, 56, 56)], ids=["whole", "split"])
def test_equal_bits_every_time(shape, layout):
    arguments = case(shape, torch.bfloat16, layout)
    first, *others = (ours(arguments, 32) for _ in range(5))
    for found in others:
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x, weight, bias, _ = (t.cuda() for t in case((2, 8, 3, 5), dtype, CHANNELS_LAST))
    torch.library.opcheck(norm._operator(), (*(t.requires_grad_() for t in (x, weight, bias)), 4, 1e-5))


def test_captured_without_a_wait():
    x, weight, bias, grad = (t.cuda() for t in case((8, 64, 20, 20), torch.bfloat16, CHANNELS_LAST))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def step():
        return torch.autograd.grad(norm.group_norm_relu(*leaves, 32, 1e-5), leaves, grad)

    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
