"""The CUDA kernel's own code, run on a CPU thread by thread, against the CPU operator and the float64 oracle."""

import ctypes

import numpy as np
import pytest
import torch

from engine import compiled
from engine.optim import ops
from tests.support.agc_cases import SETTINGS, Bag, Oracle, apart, assert_close, clipped_rows, gradients
from tests.support.emulated import Launch, emulated

pytestmark = pytest.mark.skipif(
    not compiled.loaded(), reason="engine._C is not built: python setup.py build_ext --inplace"
)
SHAPES = [(3, 18432), (2, 18433), (5, 4609), (3, 2304), (9, 1152), (40, 147), (7, 64), (3, 3), (2, 1), (20000,), (70,)]
SHAPES += [(2, 9216), (1, 4608), ()]
EPS = 1e-10


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """The emulated launch: gpu(params, grads, momenta, table, lr, hyper, copies=…, blocks=…, …)."""
    library = emulated("agc_sgd", tmp_path_factory.mktemp("emulated"))
    library.emulate.restype = ctypes.c_char_p

    def launch(params, grads, momenta, table, lr, hyper, copies=(), **options):
        told = Launch.of(params, grads, [momenta], copies, table, hyper, **options)
        lr = torch.tensor([float(lr)])
        error = library.emulate(ctypes.byref(told), ctypes.c_void_p(lr.data_ptr()))
        assert error is None, error

    launch.prefetched = library.prefetched
    launch.prefetched.restype = ctypes.c_int64
    return launch


def case(shapes, dtype=torch.float32, copy_dtype=None, standardized=False, shift=0):
    """Everything for a call on a list of tensors; two rows of the hyper table, plain and standardized."""
    bag = list(Bag(shapes, seed=3).parameters())
    grads = apart(gradients(bag, 1), dtype, shift)
    momenta = apart([torch.randn_like(p) for p in bag], torch.float32, shift)
    params = apart([p.detach() for p in bag], torch.float32, shift)
    copies = [] if copy_dtype is None else apart([torch.zeros(p.shape) for p in bag], copy_dtype, shift)
    row = int(standardized)
    rows = [min(row, int(len(shape) > 1)) for shape in shapes]
    regions = [ops.Region(shape, 0, rows[i], i) for i, shape in enumerate(shapes)]
    hyper = torch.tensor([ops.hyper_row(SETTINGS), ops.hyper_row(SETTINGS, EPS)])
    return params, grads, momenta, copies, ops.unit_table(regions), hyper, rows


def check(gpu, params, grads, momenta, copies, table, hyper, rows, **options):
    expected = [ops.eager_step(p, g, m, lr=0.1, hyper=hyper[r].tolist())
                for p, g, m, r in zip(params, grads, momenta, rows, strict=True)]  # fmt: skip
    untouched = [g.clone() for g in grads]
    gpu(params, grads, momenta, table, 0.1, hyper, copies, **options)
    assert all(torch.equal(a, b) for a, b in zip(grads, untouched, strict=True))
    assert_close(params, [e[0] for e in expected], 1e-6, "parameter")
    assert_close(momenta, [e[1] for e in expected], 1e-6, "momentum")
    if copies:
        tolerance = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}[copies[0].dtype]
        assert_close(copies, [e[2] for e in expected], tolerance, "copy")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_rows_of_all_classes(gpu, shift, seed):
    check(gpu, *case(SHAPES, shift=shift), seed=seed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_and_copies(gpu, dtype):
    check(gpu, *case(SHAPES[1:], dtype, dtype))


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("copy_dtype", [torch.float32, torch.bfloat16])
def test_standardized_rows(gpu, copy_dtype, shift):
    params, grads, momenta, copies, table, hyper, rows = case(
        SHAPES[:-4], copy_dtype=copy_dtype, standardized=True, shift=shift
    )
    check(gpu, params, grads, momenta, copies, table, hyper, rows)
    again = apart(copies, copy_dtype, shift)
    for copy in again:
        copy.fill_(float("nan"))
    gpu(params, [], [], table, 0.0, hyper, again)
    # What a resumed run derives is what the step wrote, to the bit.
    assert all(torch.equal(a, b) for a, b in zip(again, copies, strict=True))


@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_any_number_of_blocks(gpu, blocks):
    check(gpu, *case([(100, 70), (33, 640), (20, 1153), (5, 3000), (3,)]), blocks=blocks)


def test_unevenly_aligned_arrays(gpu):
    params, grads, momenta, _, table, hyper, rows = case(SHAPES)
    check(gpu, params, apart(grads, torch.float32, 1), apart(momenta, torch.float32, 2), [], table, hyper, rows)


def test_flat_storage(gpu):
    """Rows one after another in one buffer, at any place in their 16 bytes."""
    shapes = [(50, 147), (9, 27), (5, 2305), (3,)]
    sizes = [int(np.prod(shape)) for shape in shapes]
    starts = np.cumsum([0, *sizes[:-1]])
    regions = [ops.Region(shape, int(start), 0, 0) for shape, start in zip(shapes, starts, strict=True)]
    hyper = torch.tensor([ops.hyper_row(SETTINGS)])
    p, g, m = (torch.randn(sum(sizes)) for _ in range(3))
    parts = [
        [x[a : a + n].view(shape).clone() for a, n, shape in zip(starts, sizes, shapes, strict=True)] for x in (p, g, m)
    ]
    oracle = Oracle(parts[0], 0.1, SETTINGS)
    oracle.momenta = [x.double() for x in parts[2]]
    oracle.step(parts[1])
    gpu([p], [g], [m], ops.unit_table(regions), 0.1, hyper)
    found = [p[a : a + n].view(shape) for a, n, shape in zip(starts, sizes, shapes, strict=True)]
    assert_close(found, oracle.params, 1e-6)


def test_scale_and_overflow(gpu):
    params, grads, momenta, _, table, hyper, rows = case(SHAPES[3:])
    before = [x.clone() for x in (*params, *momenta)]
    gpu(params, grads, momenta, table, 0.1, hyper, amp=(torch.tensor(8.0), torch.tensor(1.0)))
    assert all(torch.equal(a, b) for a, b in zip(before, (*params, *momenta), strict=True))
    expected = [ops.eager_step(p, g, m, lr=0.1, hyper=hyper[0].tolist(), grad_scale=8.0)[0]
                for p, g, m in zip(params, grads, momenta, strict=True)]  # fmt: skip
    gpu(params, grads, momenta, table, 0.1, hyper, amp=(torch.tensor(8.0), torch.tensor(0.0)))
    assert_close(params, expected, 1e-6)


def test_without_clipping(gpu):
    params, grads, momenta, _, table, _, rows = case(SHAPES[1:])
    hyper = torch.tensor([ops.hyper_row(SETTINGS | {"clipping": None})])
    check(gpu, params, grads, momenta, [], table, hyper, rows)


@pytest.mark.parametrize("seed", range(6))
def test_teams_that_divide_while_others_lag(gpu, seed):
    check(gpu, *case([(1, 18432), (4, 9000), (8, 4608), (8, 2304)]), blocks=1, seed=seed)


@pytest.mark.parametrize("most", [1, 2, 8])
def test_devices_with_little_shared_memory(gpu, most):
    check(gpu, *case(SHAPES, copy_dtype=torch.float32), most=most)
    check(gpu, *case([(2, 18432), (3, 3000), (5, 64)], copy_dtype=torch.float32, standardized=True), most=most)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_next_row_is_asked_for(gpu, dtype):
    """Whole rows, all but each block's first; the emulator sees that none reaches past its row."""
    check(gpu, *case([(6, 4608), (8, 1152)], dtype), blocks=2)
    # Blocks of 4 warps take the long rows one by one, then 4 of the short ones at once.
    assert gpu.prefetched() == (4 * 4608 + 8 * 1152) * (8 + dtype.itemsize)


@pytest.mark.parametrize("shift", [1, 3])
def test_rows_that_begin_anywhere_are_asked_for_within_their_bounds(gpu, shift):
    check(gpu, *case(SHAPES, torch.bfloat16, shift=shift), blocks=2)
    assert gpu.prefetched() > 0


@pytest.mark.parametrize("standardized", [False, True])
def test_clipped_rows_are_counted(gpu, standardized):
    params, grads, momenta, copies, table, hyper, rows = case(SHAPES[:-4], standardized=standardized)
    expected = clipped_rows(params, grads, [hyper[row].tolist() for row in rows])
    counters = torch.zeros(len(table.units) + 1, dtype=torch.int32)
    for _ in range(2):
        start = [[x.clone() for x in tensors] for tensors in (params, momenta)]
        gpu(start[0], grads, start[1], table, 0.1, hyper, copies, clipped=counters)
    gpu(params, grads, momenta, table, 0.1, hyper, copies, clipped=counters, amp=(None, torch.tensor(1.0)))
    assert counters[-1] == 2
    found = torch.zeros(len(params), dtype=torch.int64).index_add_(0, table.owners, counters[:-1].long())
    assert found.tolist() == [2 * number for number in expected]
    assert 0 < sum(expected) < sum(len(p) if p.ndim > 1 else 1 for p in params)
