"""Convolutions as products, against torch's convolutions of float64."""

import pytest
import torch
from torch.nn import functional as F

from engine.network import bit, products

NAMES = ("convolve", "convolve_two", "convolve_onto", "convolve_patches")
SIZES = [
    (2, 5, 7, 6, 9),
    (1, 16, 8, 1, 1),
    (3, 4, 32, 40, 33),
    (2, 3, 3, 2, 5),
    (0, 4, 8, 3, 3),
]  # batch, in, out, h, w
# Of a sum of products: rounded once at the end in bfloat16, and at each addition in float32.
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-7, "atol": 2**-6}}

ARE_FASTER = products._are_faster.__wrapped__


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    """Also on a processor where convolutions are faster."""
    monkeypatch.setattr(products, "_are_faster", lambda _: True)


@pytest.fixture
def narrow(monkeypatch):
    """Patches for the few channels of small networks as well."""
    monkeypatch.setattr(products, "WIDE", 1)


def drawn(*shape, dtype, seed):
    found = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return found.contiguous(memory_format=torch.channels_last)


def check(ours, oracle, tensors, dtype):
    outputs = ours(*tensors)
    doubles = [each.detach().double().requires_grad_() for each in tensors]
    expected = oracle(*doubles)
    weights = [drawn(*out.shape, dtype=dtype, seed=7 + k).contiguous() for k, out in enumerate(outputs)]
    found = torch.autograd.grad(outputs, tensors, weights)
    wanted = torch.autograd.grad(expected, doubles, [each.double() for each in weights])
    for one, other in zip([*outputs, *found], [*expected, *wanted], strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        scale = max(1.0, float(other.detach().abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one.double() / scale, other / scale, **CLOSE[dtype])
    for out in outputs:
        assert not out.numel() or out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one(size, dtype):
    batch, cin, cout, *sides = size
    x = drawn(batch, cin, *sides, dtype=dtype, seed=0).requires_grad_()
    kernel = drawn(cout, cin, 1, 1, dtype=dtype, seed=1).requires_grad_()
    check(lambda x, k: [products.convolve(x, k)], lambda x, k: [F.conv2d(x, k)], [x, kernel], dtype)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_two_of_one_input(size, stride, dtype):
    batch, cin, cout, *sides = size
    x = drawn(batch, cin, *sides, dtype=dtype, seed=0).requires_grad_()
    kernels = [drawn(n, cin, 1, 1, dtype=dtype, seed=n).requires_grad_() for n in (cout, cout + 3)]
    check(lambda x, k, o: products.convolve_two(x, k, o, stride),
          lambda x, k, o: [F.conv2d(x, k), F.conv2d(x, o, stride=stride)], [x, *kernels], dtype)  # fmt: skip


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_onto_another(size, dtype):
    batch, cin, cout, *sides = size
    x = drawn(batch, cin, *sides, dtype=dtype, seed=0).requires_grad_()
    kernel = drawn(cout, cin, 1, 1, dtype=dtype, seed=1).requires_grad_()
    before = drawn(batch, cout, *sides, dtype=dtype, seed=2).requires_grad_()
    check(lambda t, x, k: [products.convolve_onto(t.clone(), x, k)], lambda t, x, k: [t + F.conv2d(x, k)],
          [before, x, kernel], dtype)  # fmt: skip
    total = before.detach().clone(memory_format=torch.preserve_format)
    assert products.convolve_onto(total, x, kernel).data_ptr() == total.data_ptr()


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches(size, stride, dtype):
    batch, cin, cout, *sides = size
    x = drawn(batch, cin, *sides, dtype=dtype, seed=0).requires_grad_()
    kernel = drawn(cout, cin, 3, 3, dtype=dtype, seed=1).requires_grad_()
    check(lambda x, k: [products.convolve_patches(x, k, stride)], lambda x, k: [F.conv2d(x, k, None, stride, 1)],
          [x, kernel], dtype)  # fmt: skip


def test_only_what_asks_for_a_gradient_gets_one():
    x, other = (drawn(2, 4, 4, 4, dtype=torch.float32, seed=0) for _ in range(2))
    kernel = drawn(8, 4, 1, 1, dtype=torch.float32, seed=1).requires_grad_()
    products.convolve_two(x, kernel, other[:, :, :1, :1], 2)[0].sum().backward()
    torch.testing.assert_close(kernel.grad, x.sum((0, 2, 3)).expand(8, 4)[:, :, None, None])


def test_what_it_does_not_take():
    x, kernel = drawn(2, 4, 4, 4, dtype=torch.float32, seed=0), drawn(8, 4, 1, 1, dtype=torch.float32, seed=1)
    assert products.fits(x, kernel)
    assert not products.fits(x.contiguous(), kernel)
    assert not products.fits(x.double(), kernel.double()) and not products.fits(x.half(), kernel.half())
    assert not products.fits(x.bfloat16(), kernel)
    assert not products.fits(x.to("meta"), kernel.to("meta"))
    large = drawn(1, 4, 33, 32, dtype=torch.float32, seed=0)
    assert not products.fits(large, kernel) and products.fits(large.bfloat16(), kernel.bfloat16())
    assert products.fits_two(large, kernel, kernel)
    with torch.autocast("cpu", torch.bfloat16):
        assert not products.fits(x, kernel) and products.fits(x.bfloat16(), kernel.bfloat16())
    assert not products.fits_onto(x.contiguous(), x, kernel) and not products.fits_onto(x.double(), x, kernel)
    for batch, fits in ((8, True), (9, False)):
        many = drawn(batch, 512, 16, 16, dtype=torch.float32, seed=0)
        assert products.fits_patches(many, kernel, 1) is fits and products.fits_patches(many, kernel, 2)
    assert not products.fits_patches(x, kernel, 1)
    with torch.no_grad():
        assert not products.fits_patches(many, kernel, 2)


@pytest.mark.parametrize(
    ("conv", "by"),
    [
        (bit.StdConv2d(4, 8, 1, bias=False), "convolve"),
        (bit.StdConv2d(4, 8, 3, padding=1, bias=False), "convolve_patches"),
        (bit.StdConv2d(4, 8, 3, 2, padding=1, bias=False), "convolve_patches"),
        (bit.StdConv2d(4, 8, 1), None),
        (bit.StdConv2d(4, 8, 1, 2, bias=False), None),
        (bit.StdConv2d(4, 8, 1, groups=2, bias=False), None),
        (bit.StdConv2d(4, 8, 1, padding=1, bias=False), None),
        (bit.StdConv2d(4, 8, 3, bias=False), None),
        (bit.StdConv2d(4, 8, 3, (1, 2), padding=1, bias=False), None),
        (bit.StdConv2d(4, 8, 3, padding=1, dilation=2, bias=False), None),
        (bit.StdConv2d(4, 8, 3, padding=1, padding_mode="reflect", bias=False), None),
        (bit.StdConv2d(4, 8, (1, 3), padding=(0, 1), bias=False), None),
    ],
    ids=lambda value: "" if value is None else value if isinstance(value, str) else value.extra_repr(),
)
def test_which_convolutions_are_products(narrow, monkeypatch, conv, by):
    called = []
    for name in ("convolve", "convolve_patches"):
        whole = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *given, name=name, whole=whole: called.append(name) or whole(*given))
    x = drawn(2, 4, 5, 6, dtype=torch.float32, seed=0)
    found = conv(x)
    assert called == ([by] if by else [])
    if conv.padding_mode == "zeros":
        given = conv.stride, conv.padding, conv.dilation, conv.groups
        torch.testing.assert_close(
            found, F.conv2d(x, bit.standardize(conv.weight), conv.bias, *given), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("recompute", ["none", "norm", "unit"])
def test_a_network_is_the_same_function(narrow, monkeypatch, recompute):
    """Units with a projection, of stride 1 and 2, and without one: outputs and gradients, beside convolutions."""
    torch.manual_seed(0)
    model = bit.build("R20x0.25-32px", 10, zero_head=False, recompute=recompute).to(memory_format=torch.channels_last)
    x = drawn(4, 3, 32, 32, dtype=torch.float32, seed=3)
    called = []
    for name in NAMES:
        whole = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *given, name=name, whole=whole: called.append(name) or whole(*given))

    def passes():
        model.zero_grad()
        loss = F.cross_entropy(model(x), torch.tensor([0, 3, 5, 9]))
        loss.backward()
        return [loss.detach(), *(each.grad for each in model.parameters())]

    ours = passes()
    assert set(called) == set(NAMES)
    called.clear()
    monkeypatch.setattr(products, "_are_faster", lambda _: False)
    torch.testing.assert_close(ours, passes(), rtol=1e-4, atol=1e-5)
    assert not called


@pytest.mark.parametrize(
    ("vectors", "processor", "float32", "bfloat16"),
    [
        ("AVX512", "Intel(R) Xeon(R) Processor", True, True),
        ("AVX512_VNNI", "AMD EPYC", False, True),
        ("AVX512", None, False, True),
        ("AVX2", "Intel(R) Xeon(R) Processor", False, False),
    ],
)
def test_products_of_float32_are_for_processors_that_their_library_is_made_for(
    monkeypatch, vectors, processor, float32, bfloat16
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    known = (lambda: {"cpu_name": processor}) if processor else None
    monkeypatch.setattr(torch.cpu, "get_capabilities", known)
    assert ARE_FASTER(torch.float32) is float32 and ARE_FASTER(torch.bfloat16) is bfloat16
