"""The CUDA kernels of AdamW behind AGC, run on a CPU thread by thread, against the float64 oracle."""

import ctypes

import pytest
import torch

from engine import compiled
from engine.optim import ops
from tests.support.agc_cases import ADAMW, AdamWOracle, Bag, apart, assert_close, assert_states_close, gradients
from tests.support.emulated import Launch, emulated

pytestmark = pytest.mark.skipif(
    not compiled.loaded(), reason="engine._C is not built: python setup.py build_ext --inplace"
)
SHAPES = [(1, 18432), (1, 18433), (3, 4609), (2, 2304), (5, 1152), (20, 147), (7, 64), (3, 3), (2, 1), (20000,), ()]
EPS = 1e-10


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """The emulated launches: gpu(params, grads, states, table, hyper, steps, copies=…, …); states: 2 lists or 3."""
    library = emulated("agc_adamw", tmp_path_factory.mktemp("emulated"))
    library.emulate.restype = ctypes.c_char_p
    library.prefetched.restype = ctypes.c_int64

    def launch(params, grads, states, table, hyper, steps, copies=(), **options):
        told = Launch.of(params, grads, states, copies, table, hyper, **options)
        lr = torch.tensor([ADAMW["lr"]])
        numbers = ctypes.c_void_p(lr.data_ptr()), ctypes.c_void_p(steps.data_ptr())
        error = library.emulate(ctypes.byref(told), *numbers, ctypes.c_int64(len(hyper)), int(len(states) == 3))
        assert error is None, error

    launch.prefetched = library.prefetched
    return launch


class Case:
    """A call on a list of tensors, each with a state of three arrays, and the oracle of the same."""

    def __init__(self, shapes, dtype=torch.float32, copy_dtype=None, standardized=False, shift=0, settings=ADAMW):
        bag = list(Bag(shapes, seed=3).parameters())
        self.params = apart([p.detach() for p in bag], torch.float32, shift)
        self.grads = [apart(gradients(bag, step), dtype, shift) for step in (1, 2)]
        self.states = [apart([torch.zeros_like(p) for p in bag], torch.float32, shift) for _ in range(2)]
        self.states.append(apart([p.detach() for p in bag], torch.float32, shift))
        self.copies = [] if copy_dtype is None else apart([torch.zeros(p.shape) for p in bag], copy_dtype, shift)
        rows = [int(standardized and len(shape) > 1) for shape in shapes]
        self.table = ops.unit_table([ops.Region(shape, 0, rows[i], i) for i, shape in enumerate(shapes)])
        self.hyper = torch.tensor([ops.adamw_row(settings), ops.adamw_row(settings, EPS)])
        self.oracle = AdamWOracle(bag, settings, [EPS if row else -1.0 for row in rows])
        self.steps = torch.tensor(0.0)

    def check(self, gpu, averages=True, **options):
        states = self.states if averages else self.states[:2]
        for grads in self.grads:
            gpu(self.params, grads, states, self.table, self.hyper, self.steps, self.copies, **options)
            self.oracle.step(grads)
        assert self.steps == len(self.grads)
        assert_close(self.params, self.oracle.params, 1e-6, "parameter")
        for index, state in enumerate(states):
            assert_states_close(state, [s[index] for s in self.oracle.states], index)
        if self.copies:
            tolerance = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}[self.copies[0].dtype]
            assert_close(self.copies, self.oracle.copies, tolerance, "copy")


@pytest.mark.parametrize("averages", [True, False])
@pytest.mark.parametrize("shift", [0, 3])
def test_rows_of_all_classes(gpu, shift, averages):
    Case(SHAPES, shift=shift).check(gpu, averages)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_and_copies(gpu, dtype):
    Case(SHAPES[2:], dtype, dtype).check(gpu, seed=1)


@pytest.mark.parametrize("copy_dtype", [torch.float32, torch.bfloat16])
def test_standardized_rows(gpu, copy_dtype):
    Case(SHAPES[:-4], copy_dtype=copy_dtype, standardized=True).check(gpu, blocks=2)


def test_unevenly_aligned_arrays(gpu):
    case = Case(SHAPES[2:])
    case.states[1] = apart(case.states[1], torch.float32, 1)
    case.check(gpu)


@pytest.mark.parametrize("most", [1, 4])
def test_devices_with_little_shared_memory(gpu, most):
    Case(SHAPES[2:]).check(gpu, most=most)


def test_overflow_changes_nothing_and_does_not_count(gpu):
    case = Case(SHAPES[3:])
    before = [x.clone() for x in (*case.params, *sum(case.states, []))]
    amp = torch.tensor(8.0), torch.tensor(1.0)
    gpu(case.params, case.grads[0], case.states, case.table, case.hyper, case.steps, amp=amp)
    assert all(torch.equal(a, b) for a, b in zip(before, (*case.params, *sum(case.states, [])), strict=True))
    assert case.steps == 0
    case.grads = [[8 * g for g in grads] for grads in case.grads]
    for grads in case.grads:
        case.oracle.step(grads, grad_scale=8.0)
        amp = torch.tensor(8.0), torch.tensor(0.0)
        gpu(case.params, grads, case.states, case.table, case.hyper, case.steps, amp=amp)
    assert_close(case.params, case.oracle.params, 1e-6)


def test_the_next_row_is_asked_for(gpu):
    case = Case([(6, 4608), (8, 1152)])
    case.check(gpu, blocks=2)
    assert gpu.prefetched() == (4 * 4608 + 8 * 1152) * 20  # parameter, gradient, three states
