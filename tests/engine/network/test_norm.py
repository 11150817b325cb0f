"""Group norm with ReLU, the operator: against torch in float64, as an operator, and in a network."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from engine import compiled
from engine.network import bit, family, norm, products
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

pytestmark = pytest.mark.skipif(
    not compiled.loaded(), reason="engine._C is not built: python setup.py build_ext --inplace"
)


def operator():
    return norm._operator()


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_agrees_with_float64(shape, groups, dtype, layout):
    arguments = case(shape, dtype, layout)
    found = through(norm.group_norm_relu, *arguments, groups)
    assert found[0].dtype == found[1].dtype == dtype
    assert found[0].stride() == found[1].stride() == arguments[0].stride()
    # Parameters' gradients are sums in float and double of exact halves.
    agrees(found, exact(*arguments, groups), [DTYPES[dtype]] * 2 + [4e-6] * 2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_the_gradient_of_a_shortcut_joins(shape, groups, dtype, layout):
    arguments = case(shape, dtype, layout)
    shortcut = shortcut_of(arguments[3])
    found = through_beside(*arguments, shortcut, groups)
    assert found[1].dtype == dtype and found[1].stride() == arguments[0].stride()
    agrees(found, with_shortcut(exact(*arguments, groups), shortcut), [DTYPES[dtype]] * 2 + [4e-6] * 2)


def test_a_shortcut_in_float32_is_added_as_torch_would():
    arguments = case((2, 64, 13, 11), torch.float32, CHANNELS_LAST)
    shortcut, alone = shortcut_of(arguments[3]), ours(*arguments, 32)
    found = through_beside(*arguments, shortcut, 32)
    assert all(torch.equal(a, b) for a, b in zip(found, [alone[0], alone[1] + shortcut, *alone[2:]], strict=True))


def test_either_path_may_be_left_out():
    x, weight, bias, grad = case((2, 8, 3, 3), torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    output, around = norm.beside_shortcut(*leaves, 4, 1e-5)
    assert torch.equal(around, x) and around.data_ptr() == x.data_ptr()
    assert torch.equal(torch.autograd.grad(around, x, grad, retain_graph=True)[0], grad)
    alone = torch.autograd.grad(output, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(alone, ours(x, weight, bias, grad, 4)[1:], strict=True))
    with torch.no_grad():
        assert torch.equal(norm.beside_shortcut(*leaves, 4, 1e-5)[0], output)


@pytest.mark.parametrize(("as_products", "adds"), [(False, [8, 8, 4, 2]), (True, [4, 2, 1])])
def test_a_network_adds_no_gradient_of_a_shortcut_by_itself(monkeypatch, as_products, adds):
    """In its own pass over memory that is: autograd does so only where two convolutions read one map, in the units that
    change the shape; as products of matrices they add what the strided one has, where it has some."""
    monkeypatch.setattr(products, "_are_faster", lambda _: as_products)
    model = bit.build("R50x1", 3, zero_head=False).to(memory_format=CHANNELS_LAST)
    x = torch.randn(1, 3, 32, 32).contiguous(memory_format=CHANNELS_LAST)
    loss = model(x).sum()
    added = []

    class Adds(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor) and args[0].ndim == 4:
                added.append(args[0].shape[2])
            return function(*args, **(kwargs or {}))

    with Adds():
        loss.backward()
    assert sorted(added, reverse=True) == adds


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=["contiguous", "channels_last"])
def test_random_shapes(layout):
    generator = torch.Generator().manual_seed(1)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    for seed in range(40):
        groups = number(1, 9)
        shape = (number(1, 5), groups * number(1, 20), number(1, 20), number(1, 20))
        dtype = list(DTYPES)[seed % 3]
        arguments = case(shape, dtype, layout, mean=number(-3, 4), seed=seed)
        found = through(norm.group_norm_relu, *arguments, groups)
        agrees(found, exact(*arguments, groups), [2 * DTYPES[dtype]] * 2 + [2e-5] * 2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("first", [1.0, -3e4], ids=["even", "outlier_first"])
def test_a_large_mean_cancels_nothing(layout, first):
    """Mean 1e4, deviation 1: with E x² - (E x)² in float32 nothing would be left of the variance, 1e8 being 2^27."""
    x, weight, bias, grad = case((2, 64, 23, 19), torch.float32, layout, mean=1e4)
    x[0, :, 0, 0] = 1e4 + first  # what a shift by the first element would be misled by
    # Away from the kink: where the mask is, the last bit of the mean decides, here 1e-3 deviations.
    weight, bias = weight.clamp(-1, 1) * 0.1, bias.sign() * 60
    found, right = (function(x, weight, bias, grad, 32) for function in (ours, exact))
    agrees(found, right, [1e-3, 1e-3, 5e-3, 4e-6])
    _, mean, inverse = operator()(x, weight, bias, 32, 1e-5)
    rows = x.double().reshape(2, 32, -1)
    assert (mean - rows.mean(2)).abs().max() <= 1e-3  # float32's spacing at 1e4
    assert (inverse * (rows.var(2, unbiased=False) + 1e-5).sqrt() - 1).abs().max() < 1e-6


def ours(x, weight, bias, grad, groups):
    return through(norm.group_norm_relu, x, weight, bias, grad, groups)


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("level", [0.0, 1e-30, 1234.567, -1e30])
def test_constant_groups_give_the_bias(layout, level):
    _, weight, bias, grad = case((2, 6, 9, 9), torch.float32)
    x = torch.full((2, 6, 9, 9), level).contiguous(memory_format=layout)
    found = ours(x, weight, bias, grad, 3)
    assert torch.equal(found[0], F.relu(bias)[None, :, None, None].expand_as(x))
    assert all(torch.isfinite(t).all() for t in found)
    assert not found[2].any()


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_normalize(shape, dtype):
    x, weight, bias, grad = case(shape, dtype)
    found = ours(x, weight, bias, grad, 3)
    assert found[0].shape == found[1].shape == shape
    assert not found[2].any() and not found[3].any()


def test_not_a_number_stays_one():
    x, weight, bias, grad = case((2, 6, 4, 4), torch.bfloat16)
    x[1, 2, 0, 0] = torch.nan
    found = ours(x, weight, bias, grad, 3)
    assert found[0][1, 2:4].isnan().all()
    assert not found[0][0].isnan().any() and not found[0][1, :2].isnan().any()


def test_any_strides():
    """Neither layout, and an expanded gradient, as the mean over pixels sends back."""
    x, weight, bias, grad = case((3, 12, 8, 8), torch.float32)
    for odd in (x.transpose(2, 3), x[:, :, ::2], x.transpose(0, 2).contiguous().transpose(0, 2)):
        g = grad[:, :, :1, :1].expand_as(odd)
        right = exact(odd, weight, bias, g, 4)
        agrees(ours(odd, weight, bias, g, 4), right, [4e-6] * 4)
        agrees(through_beside(odd, weight, bias, g, g, 4), with_shortcut(right, g), [4e-6] * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters(dtype):
    x, weight, bias, grad = case((3, 12, 8, 8), dtype)
    arguments = x, weight.to(dtype), bias.to(dtype), grad
    found = ours(*arguments, 4)
    assert {t.dtype for t in found} == {dtype}
    agrees(found, exact(*arguments, 4), [DTYPES[dtype]] * 4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 64, 56, 50), (2, 96, 14, 14), (3, 40, 33, 29), (17, 32, 7, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_bits_whatever_the_threads(shape, dtype, layout):
    arguments = case(shape, dtype, layout, mean=2.0)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ours(*arguments, 8))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], found, strict=True))


def test_derivatives_by_differences():
    """The gradient along random directions, beside differences of the float64 norm."""
    x, weight, bias, grad = case((2, 8, 5, 5), torch.float32)
    found = ours(x, weight, bias, grad, 4)[1:]
    for seed, index in itertools.product(range(3), range(3)):
        generator = torch.Generator().manual_seed(seed)
        values = [t.double() for t in (x, weight, bias)]
        direction = torch.randn(values[index].shape, generator=generator, dtype=torch.float64)
        ends = []
        for step in (1e-6, -1e-6):
            moved = list(values)
            moved[index] = values[index] + step * direction
            ends.append((norm.plain(*moved, 4, 1e-5) * grad).sum())
        assert float((found[index] * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2e-6, rel=1e-3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, layout):
    x, weight, bias, grad = case((2, 8, 3, 5), dtype, layout)
    op, leaves = operator(), [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(op, (*leaves, 4, 1e-5))
    _, mean, inverse = op(*leaves, 4, 1e-5)
    saved = [t.detach() for t in (grad, *leaves, mean, inverse)]
    torch.library.opcheck(torch.ops.boosterbit.group_norm_relu_backward.default, (*saved, 4))
    torch.library.opcheck(torch.ops.boosterbit.group_norm_relu_backward.default, (*saved, 4, shortcut_of(grad)))


def test_keeps_its_input_and_the_statistics_only():
    x, weight, bias, _ = case((2, 64, 8, 8), torch.bfloat16, CHANNELS_LAST)
    kept = []
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm.group_norm_relu(*leaves, 32, 1e-5)
    own = [t for t in kept if t.data_ptr() not in {leaf.data_ptr() for leaf in leaves}]
    assert sorted(tuple(t.shape) for t in own) == [(2, 32), (2, 32)]


def test_autocast_leaves_its_input_alone():
    x, weight, bias, _ = case((2, 64, 8, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm.group_norm_relu(x, weight, bias, 32, 1e-5).dtype == torch.float32
        assert norm.group_norm_relu(x.bfloat16(), weight, bias, 32, 1e-5).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 5}, "do not make 5 equal groups"),
        ({"groups": 0}, "do not make 0 equal groups"),
        ({"weight": torch.ones(7)}, "the weight has shape"),
        ({"bias": torch.ones(8, dtype=torch.float64)}, "the bias is Double"),
        ({"x": torch.ones(2, 8, 3, 3, dtype=torch.float64)}, "the input is Double"),
        ({"x": torch.ones(8)}, "1 dimensions"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refuses(change, message, device):
    arguments = {"x": torch.ones(2, 8, 3, 3), "weight": torch.ones(8), "bias": torch.ones(8), "groups": 4} | change
    x, weight, bias, groups = arguments.values()
    with pytest.raises(RuntimeError, match=message):
        operator()(x.to(device), weight.to(device), bias.to(device), groups, 1e-5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("shortcut", [torch.ones(2, 8, 3, 4), torch.ones(2, 8, 3, 3, dtype=torch.bfloat16)])
def test_refuses_a_shortcut_of_another_kind(shortcut, device):
    x, weight, bias, grad = case((2, 8, 3, 3), torch.float32)
    _, mean, inverse = operator()(x, weight, bias, 4, 1e-5)
    given = [t.to(device) for t in (grad, x, weight, bias, mean, inverse)]
    with pytest.raises(RuntimeError, match="the shortcut's gradient is"):
        torch.ops.boosterbit.group_norm_relu_backward(*given, 4, shortcut.to(device))


def test_where_it_does_not_fit_torch_does_it():
    x, weight, bias, _ = case((2, 8, 3, 3), torch.float32)
    assert norm.fits(x, weight, bias)
    assert not norm.fits(x.double(), weight.double(), bias.double())
    assert not norm.fits(*(t.to("meta") for t in (x, weight, bias)))
    wide = norm.group_norm_relu(x.double(), weight.double(), bias.double(), 4, 1e-5)
    assert torch.equal(wide, F.relu(F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-5)))
    beside = norm.beside_shortcut(x.double(), weight.double(), bias.double(), 4, 1e-5)
    assert torch.equal(beside[0], wide) and torch.equal(beside[1], x.double())


@pytest.fixture
def one_thread():
    """So small a network waits for threads longer than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_fifty_steps_of_a_network_agree_with_the_plain_path(monkeypatch):
    torch.manual_seed(0)
    with_a_shortcut = replace(family.MEMBERS["R8x0.25-8px"], depths=(2, 1))
    monkeypatch.setitem(family.MEMBERS, "R8x0.25-8px", with_a_shortcut)
    start = bit.build("R8x0.25-8px", 5, zero_head=False).to(memory_format=CHANNELS_LAST)
    images = torch.randn(50, 6, 3, 8, 8).contiguous()
    labels = torch.randint(5, (50, 6))
    fused = losses(copy.deepcopy(start), images, labels)
    monkeypatch.setattr(norm, "fits", lambda *_: False)
    plain = losses(copy.deepcopy(start), images, labels)
    right = losses(copy.deepcopy(start).double(), images.double(), labels)
    assert (right[0] - right[-1]).abs() > 1e-3
    # Rounding at first; later a ReLU that rounding puts on the other side of its kink moves the loss by up to 1e-4, as
    # it does between the plain path and float64.
    for a, b in ((fused, plain), (fused, right), (plain, right)):
        assert (a - b)[:3].abs().max() < 2e-6
        assert (a - b).abs().max() < 5e-4


def losses(model, images, labels):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    found = []
    for x, y in zip(images, labels, strict=True):
        loss = F.cross_entropy(model(x.contiguous(memory_format=CHANNELS_LAST)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach().double())
    return torch.stack(found)
