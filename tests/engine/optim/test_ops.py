"""The operators as operators: schemas, tracing, tables, refusals."""

import pytest
import torch

from engine import compiled
from engine.optim import ops

pytestmark = pytest.mark.skipif(
    not compiled.loaded(), reason="engine._C is not built: python setup.py build_ext --inplace"
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HYPER = [(0.9, 1e-3, 0.01, 1e-3, 1.0, -1.0), (0.9, 1e-3, 0.01, 1e-3, 1.0, 1e-10)]


def arguments(device="cpu", grad=torch.float32):
    """One call on flat storage: a plain (6, 5) and a standardized (3, 7) parameter."""
    table = ops.unit_table([ops.Region((6, 5), 0, 0), ops.Region((3, 7), 32, 1)]).to(torch.device(device))
    p, g, m = (torch.randn(64, device=device) for _ in range(3))
    return [p, g.to(grad), m, table.units, table.classes, torch.tensor([0.1], device=device), hyper(device)]


def hyper(device="cpu"):
    return torch.tensor(HYPER, device=device)


def amp(device):
    return {"grad_scale": torch.tensor([2.0], device=device), "found_inf": torch.zeros(1, device=device)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_opcheck_flat(dtype, device):
    op = torch.ops.boosterbit.agc_sgd_.default
    torch.library.opcheck(op, arguments(device, dtype))
    call = arguments(device)
    more = {"copy": torch.zeros(64, dtype=dtype, device=device), "clipped": counters(call[3], device)}
    torch.library.opcheck(op, call, amp(device) | more)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_list(device):
    shapes = [(6, 5), (3, 7)]
    table = ops.unit_table([ops.Region(shape, 0, i, i) for i, shape in enumerate(shapes)]).to(torch.device(device))
    lists = [[torch.randn(shape, device=device) for shape in shapes] for _ in range(4)]
    tables = table.units, table.classes, torch.tensor([0.1], device=device), hyper(device)
    op = torch.ops.boosterbit.agc_sgd_list_.default
    torch.library.opcheck(op, (*lists[:3], *tables), {"copies": []})
    torch.library.opcheck(op, (*lists[:3], *tables), amp(device) | {"copies": lists[3]})


ADAMW_HYPER = [(0.1, 1e-3, 1e-2, 0.01, 1e-3, 1e-8, 0.01, -1.0), (0.1, 1e-3, 1e-2, 0.01, 1e-3, 1e-8, 0.01, 1e-10)]


def adamw_arguments(device="cpu"):
    p, g, m, units, classes, lr, _ = arguments(device)
    v, steps = torch.rand(64, device=device), torch.zeros((), device=device)
    return [p, g, m, v, units, classes, lr, torch.tensor(ADAMW_HYPER, device=device), steps]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("averages", [True, False])
def test_opcheck_adamw(averages, device):
    call = adamw_arguments(device)
    more = {"copy": torch.zeros(64, dtype=torch.bfloat16, device=device), "clipped": counters(call[4], device)}
    ema = {"ema": torch.zeros(64, device=device)} if averages else {}
    torch.library.opcheck(torch.ops.boosterbit.agc_adamw_.default, call, amp(device) | more | ema)
    lists = [[tensor] for tensor in call[:4]]
    emas = {"emas": [ema["ema"]] if averages else [], "copies": [more["copy"]]}
    torch.library.opcheck(torch.ops.boosterbit.agc_adamw_list_.default, (*lists, *call[4:]), emas)


def counters(units, device="cpu"):
    return torch.zeros(len(units) + 1, dtype=torch.int32, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_opcheck_copy(dtype, device):
    p, _, _, units, classes, _, table = arguments(device)
    copy = torch.zeros(64, dtype=dtype, device=device)
    torch.library.opcheck(torch.ops.boosterbit.write_copy_.default, (p, copy, units, classes, table))


def test_a_step_is_traced():
    p, g, m, *tables = arguments()
    expected = p.clone(), m.clone()
    torch.ops.boosterbit.agc_sgd_(expected[0], g, expected[1], *tables)

    def step(p, g, m):
        torch.ops.boosterbit.agc_sgd_(p, g, m, *tables)
        return p * 2

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(p, g, m), 2 * expected[0])
    assert torch.equal(m, expected[1])


def test_units_are_rows_and_the_longest_come_first():
    regions = [
        ops.Region((2, 1152), 0, 0, 3),
        ops.Region((5,), 7, 1, 2),
        ops.Region((), 5, 1),
        ops.Region((3, 18433), 0, 0),
        ops.Region((0, 4), 0, 0),
        ops.Region((2, 3, 2), 100, 2),
        ops.Region((3, 3000), 0, 4, 5, free=True),
    ]
    table = ops.unit_table(regions)
    expected = [[18433 * i, 18433, 0, 0] for i in range(3)]  # too long for a block
    expected += [[0, 4096, 4, 5], [4096, 4096, 4, 5]]
    expected += [[0, 1152, 0, 3], [1152, 1152, 0, 3]]
    expected += [[8192, 808, 4, 5], [100, 6, 2, 0], [106, 6, 2, 0], [7, 5, 1, 2], [5, 1, 1, 0]]
    assert table.units.tolist() == expected
    assert table.classes == [3, 0, 0, 2, 0, 7]


@pytest.mark.parametrize("wrong", [{"offset": -1}, {"hyper": -1}, {"tensor": -1}])
def test_a_region_that_starts_before_its_tensor_or_names_none_is_refused(wrong):
    right = {"offset": 0, "hyper": 0, "tensor": 0}
    assert ops.unit_table([ops.Region((2, 3), **right)]).units.tolist() == [[0, 3, 0, 0], [3, 3, 0, 0]]
    with pytest.raises(ValueError, match="0 or more"):
        ops.unit_table([ops.Region((2, 3), **right), ops.Region((2, 3), **right | wrong)])


def test_the_largest_row_of_the_family_fits_on_chip():
    assert ops.unit_table([ops.Region((1, 18432), 0, 0)]).classes == [0, 1, 0, 0, 0, 0]


def test_no_units():
    table = ops.unit_table([ops.Region((0, 3), 0, 0)])
    assert table.units.shape == (0, 4)
    p, g, m, _, _, lr, rows = arguments()
    before = p.clone()
    torch.ops.boosterbit.agc_sgd_(p, g, m, table.units, table.classes, lr, rows)
    assert torch.equal(p, before)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(64, dtype=torch.float64), "parameter 0 is Double; float32 expected"),
        (0, torch.zeros(64, 2)[:, 0], "not dense in memory"),
        (1, torch.zeros(64, dtype=torch.float64), "gradient is Double"),
        (1, torch.zeros(63), "gradient 0 has shape"),
        (2, torch.zeros(64, dtype=torch.float16), "momentum 0 is Half"),
        (3, torch.tensor([[0, 65, 0, 0]]), "lies outside"),
        (3, torch.tensor([[0, 5, 2, 0]]), "lies outside"),
        (3, torch.tensor([[0, 5, 0, 1]]), "lies outside"),
        (3, torch.tensor([[0, 5, 0]]), "units has shape"),
        (3, torch.zeros(9, 4), "units must be contiguous Long"),
        (4, [1, 2], "classes count 3 units"),
        (5, torch.zeros(3), "lr has 3 values"),
        (6, torch.zeros(2, 5), "hyper has shape"),
    ],
)
def test_refusals(position, value, message):
    call = arguments()
    call[position] = value
    if position == 3:
        call[4] = []
    before = call[0].clone()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.boosterbit.agc_sgd_(*call)
    assert torch.equal(call[0], before)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (2, torch.zeros(64, dtype=torch.float16), "exp_avg 0 is Half; float32 expected"),
        (3, torch.zeros(63), "exp_avg_sq 0 has shape"),
        (7, torch.zeros(2, 6), r"hyper has shape \[2, 6\]; \(groups, 8\) expected"),
        (8, torch.zeros(2), "step has 2 values"),
        (8, torch.zeros((), dtype=torch.int64), "step must be contiguous Float"),
        ("ema", torch.zeros(64, dtype=torch.bfloat16), "ema 0 is BFloat16"),
        ("clipped", torch.zeros(9, dtype=torch.int32), "clipped has 9 counters; 9 for the units and one for the steps"),
        ("clipped", torch.zeros(10), "clipped must be contiguous Int"),
    ],
)
def test_refusals_of_adamw(position, value, message):
    call, more = adamw_arguments(), {}
    if isinstance(position, str):
        more[position] = value
    else:
        call[position] = value
    before = call[0].clone()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.boosterbit.agc_adamw_(*call, **more)
    assert torch.equal(call[0], before)
    p, g, m, v, *tables = adamw_arguments()
    with pytest.raises(RuntimeError, match="2 parameters, 1 exp_avg_sq"):
        torch.ops.boosterbit.agc_adamw_list_([p, p], [g, g], [m, m], [v], *tables, emas=[], copies=[])


def test_units_say_whose_they_are():
    """Longest first, whatever the order and gaps of the regions."""
    regions = [
        ops.Region((2, 3), 500, 0, 1), ops.Region((0, 3), 7, 0), ops.Region((3, 700), 0, 1), ops.Region((5,), 30, 0, 1),
        ops.Region((3, 3000), 0, 2, 3, free=True), ops.Region((2, 4), 2200, 1),
    ]  # fmt: skip
    table = ops.unit_table(regions)
    assert sorted(table.owners.tolist()) == [0, 0, 2, 2, 2, 3, 4, 4, 4, 5, 5]
    for (offset, length, hyper, tensor), owner in zip(table.units.tolist(), table.owners.tolist(), strict=True):
        region = regions[owner]
        assert (hyper, tensor) == (region.hyper, region.tensor)
        assert region.offset <= offset < offset + length <= region.offset + torch.Size(region.shape).numel()


def test_refusals_of_lists():
    p, g, m, *tables = arguments()
    op = torch.ops.boosterbit.agc_sgd_list_
    with pytest.raises(RuntimeError, match="2 parameters, 1 gradients"):
        op([p, p.clone()], [g], [m], *tables, copies=[])
    with pytest.raises(RuntimeError, match="gradients are"):
        op([p, p.clone()], [g, g.half()], [m, m.clone()], *tables, copies=[])


def test_autograd_notices_the_change():
    p, g, m, *tables = arguments()
    leaf = p.requires_grad_()
    squared = (leaf * leaf).sum()
    torch.ops.boosterbit.agc_sgd_(p.detach(), g, m, *tables)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_copies_are_rounded_as_torch_rounds(dtype, device):
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0))
    ties = torch.arange(0x3F800000, 0x3F900000, 0x8000) | torch.randint(0, 2, (32,)) * 0x7FFF
    param = torch.cat([bits, ties]).to(torch.int32).view(torch.float32).to(device)
    copy = torch.zeros(len(param), dtype=dtype, device=device)
    table = ops.unit_table([ops.Region((len(param),), 0, 0)]).to(torch.device(device))
    torch.ops.boosterbit.write_copy_(param, copy, table.units, table.classes, hyper(device))
    torch.testing.assert_close(copy, param.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert copy.isinf().any()
    assert copy.isnan().any()
