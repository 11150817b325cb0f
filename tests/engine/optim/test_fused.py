"""The fused optimizer against a float64 oracle, on the CPU and, where there is one, on a GPU."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine import compiled
from engine.network import bit
from engine.optim import ops
from engine.optim.agc_sgd import AgcSgd
from engine.optim.fused import ForwardWeights
from engine.optim.groups import named_groups
from engine.optim.plan import FlatCall, ListCall
from loaders.errors import UserError
from tests.support.agc_cases import SETTINGS, Bag, Oracle, arrange, assert_close, give, gradients, odd_shapes

pytestmark = pytest.mark.skipif(
    not compiled.loaded(), reason="engine._C is not built: python setup.py build_ext --inplace"
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HALF = [torch.float16, torch.bfloat16]


def assert_oracle_is_plain_arithmetic(p, g, m, lr, row):
    """One unit of the vectorised oracle, in plain Python numbers."""
    decay, weight_decay, clipping, eps, nesterov, _ = row
    p, g, m = p.tolist(), g.tolist(), m.tolist()
    limit = clipping * max(math.sqrt(math.fsum(x * x for x in p)), eps)
    norm = math.sqrt(math.fsum(x * x for x in g))
    factor = limit / max(norm, 1e-6) if norm > limit else 1.0
    descent = [factor * b + weight_decay * a for a, b in zip(p, g, strict=True)]
    momentum = [decay * c + d for c, d in zip(m, descent, strict=True)]
    new = [a - lr * (d + decay * c if nesterov else c) for a, c, d in zip(p, momentum, descent, strict=True)]
    return torch.tensor(new, dtype=torch.double), torch.tensor(momentum, dtype=torch.double)


def test_the_oracle_itself():
    torch.manual_seed(0)
    row = ops.hyper_row(SETTINGS)
    for size in (1e-3, 1.0, 100.0):
        p, g, m = torch.randn(3, 7), size * torch.randn(3, 7), torch.randn(3, 7)
        new, momentum, _ = ops.eager_step(p, g, m, lr=0.1, hyper=row)
        for i in range(3):
            expected = assert_oracle_is_plain_arithmetic(p[i].double(), g[i].double(), m[i].double(), 0.1, row)
            torch.testing.assert_close(
                torch.stack([new[i], momentum[i]]), torch.stack(expected), rtol=1e-13, atol=1e-15
            )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("layout", ["flat", "list"])
def test_a_hundred_steps_against_the_oracle(layout, channels_last, device):
    bag = Bag(odd_shapes(), channels_last=channels_last)
    oracle = Oracle(bag.parameters(), 0.05, SETTINGS)
    params = arrange(bag, layout, device)
    optimizer = AgcSgd(params, lr=0.05, implementation="fused", **SETTINGS)
    for step in range(100):
        grads = gradients(params, step % 7, device=device)
        give(params, grads, layout)
        optimizer.step()
        oracle.step(grads)
        assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
    assert [type(call) for call in optimizer._plan.calls] == [FlatCall if layout == "flat" else ListCall]
    assert_close(params, oracle.params, 1e-6, "parameter")
    momenta = [optimizer.state[p]["momentum_buffer"] for p in params]
    assert_close(momenta, oracle.momenta, 1e-6, "momentum")
    buffers = {m.untyped_storage().data_ptr() for m in momenta if m.numel()}
    assert len(buffers) == (1 if layout == "flat" else sum(p.numel() > 0 for p in params))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("copy_dtype", [torch.float32, *HALF])
def test_half_gradients_and_copies(dtype, copy_dtype, device):
    bag = Bag(odd_shapes())
    oracle = Oracle(bag.parameters(), 0.05, SETTINGS)
    params = arrange(bag, "list", device)
    copies = [torch.full_like(p.detach(), float("nan"), dtype=copy_dtype) for p in params]
    weights = ForwardWeights(dict(zip(params, copies, strict=True)))
    optimizer = AgcSgd(params, lr=0.05, forward_weights=weights, **SETTINGS)
    for step in range(10):
        grads = gradients(params, step, dtype, device)
        give(params, grads, "list")
        optimizer.step()
        oracle.step(grads)
        for p, c in zip(params, copies, strict=True):
            assert torch.equal(c, p.detach().to(copy_dtype))
    assert_close(params, oracle.params, 1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("before", [1, 31, 45])
@pytest.mark.parametrize("copy_dtype", [torch.float32, *HALF])
def test_copies_that_begin_within_a_cache_line(copy_dtype, before, device):
    """Whole lines are written past the cache, and what is beside them is not touched."""
    params = arrange(Bag(odd_shapes()), "list", device)
    buffers = [torch.full((before + p.numel() + 33,), torch.nan, dtype=copy_dtype, device=device) for p in params]
    copies = [b[before : before + p.numel()].view(p.shape) for b, p in zip(buffers, params, strict=True)]
    weights = ForwardWeights(dict(zip(params, copies, strict=True)))
    optimizer = AgcSgd(params, lr=0.05, forward_weights=weights, **SETTINGS)
    give(params, gradients(params, 0, device=device), "list")
    optimizer.step()
    for p, c, buffer in zip(params, copies, buffers, strict=True):
        assert torch.equal(c, p.detach().to(copy_dtype))
        assert buffer[:before].isnan().all() and buffer[before + p.numel() :].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("copy_dtype", [torch.float32, *HALF])
def test_standardized_copies_keep_what_is_no_number(copy_dtype, device):
    rows = torch.randn(8, 200)
    all_bits = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # rounded up, this NaN would become -0
    rows[1, 7], rows[2, 199], rows[3, 0], rows[4] = torch.nan, torch.inf, all_bits, 0.25
    rows[5].mul_(1e-20), rows[6].mul_(1e15), rows[7].mul_(1e31)
    params = [nn.Parameter(rows.to(device))]
    copies = [torch.zeros_like(p, dtype=copy_dtype) for p in params]
    weights = ForwardWeights({params[0]: copies[0]}, frozenset(params), 0.0)
    optimizer = AgcSgd(params, lr=0.0, forward_weights=weights, **SETTINGS)
    give(params, [torch.zeros_like(p) for p in params], "list")
    optimizer.step()
    assert torch.equal(params[0].detach().cpu().nan_to_num(0.5), rows.nan_to_num(0.5))
    wide = rows.double()
    expected = (wide - wide.mean(1, keepdim=True)) / wide.var(1, correction=0, keepdim=True).sqrt()
    assert torch.equal(copies[0].isnan().cpu(), expected.isnan())
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[copy_dtype]
    known = [0, 5, 6, 7]
    torch.testing.assert_close(copies[0].double().cpu()[known], expected[known], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("clipping", [0.01, None])
def test_gradients_of_any_size(size, clipping, device):
    settings = SETTINGS | {"clipping": clipping}
    bag = Bag([(3, 50), (40,), (2, 25000), ()])
    oracle = Oracle(bag.parameters(), 0.05, settings)
    params = arrange(bag, "list", device)
    optimizer = AgcSgd(params, lr=0.05, implementation="fused", **settings)
    for step in range(5):
        random = torch.Generator().manual_seed(step)
        grads = [(size * torch.randn(p.shape, generator=random)).to(device) for p in params]
        give(params, grads, "list")
        optimizer.step()
        oracle.step(grads)
    assert_close(params, oracle.params, 1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_zero_gradients_and_zero_parameters(device):
    settings = SETTINGS | {"weight_decay": 0.0}
    still = arrange(Bag([(3, 5), (4,)]), "list", device)
    zero = [nn.Parameter(torch.zeros(3, 5, device=device)), nn.Parameter(torch.zeros(4, device=device))]
    before = [p.detach().clone() for p in still]
    oracle = Oracle(zero, 0.05, settings)
    optimizer = AgcSgd(still + zero, lr=0.05, implementation="fused", **settings)
    for step in range(3):
        grads = gradients(zero, step, device=device)
        give(still + zero, [torch.zeros_like(p) for p in still] + grads, "list")
        optimizer.step()
        oracle.step(grads)
    assert all(torch.equal(p, b) for p, b in zip(still, before, strict=True))
    assert_close(zero, oracle.params, 1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_exactly_at_the_threshold_nothing_is_scaled(device):
    p = nn.Parameter(torch.full((3, 1), 4.0, device=device))
    p.grad = torch.tensor([[2.0], [2.0 + 2**-20], [2.0 - 2**-20]], device=device)
    AgcSgd([p], lr=1.0, momentum=0.0, nesterov=False, clipping=0.5, implementation="fused").step()
    assert p.flatten().tolist() == [2.0, 2.0, 2.0 + 2**-20]


@pytest.mark.parametrize("device", DEVICES)
def test_below_the_smallest_norm_the_quotient_is_by_that_norm(device):
    # limit 1e-9: a norm of 5e-10 is under it and stays, one of 5e-8 is over it and is divided by 1e-6
    p = nn.Parameter(torch.zeros(2, 1, device=device))
    p.grad = torch.tensor([[5e-10], [5e-8]], device=device)
    AgcSgd([p], lr=1.0, momentum=0.0, nesterov=False, clipping=1e-6, implementation="fused").step()
    assert p.flatten().tolist() == pytest.approx([-5e-10, -5e-8 * 1e-9 / 1e-6], rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["flat", "list"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_found_inf_leaves_every_bit(bad, layout, device):
    params = arrange(Bag(odd_shapes()), layout, device)
    optimizer = AgcSgd(params, lr=0.05, implementation="fused", **SETTINGS)
    give(params, gradients(params, 0, device=device), layout)
    optimizer.step()
    momenta = [optimizer.state[p]["momentum_buffer"] for p in params]
    before = [t.detach().clone() for t in (*params, *momenta)]
    give(params, gradients(params, 1, device=device), layout)
    params[3].grad[1, 2] = bad
    scaler = torch.amp.GradScaler(device, init_scale=256.0)
    scaler.scale(torch.ones((), device=device))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 128.0
    assert all(
        a.detach().view(torch.int32).equal(b.view(torch.int32))
        for a, b in zip((*params, *momenta), before, strict=True)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("unscale_first", [True, False])
def test_scaled_gradients_are_unscaled_in_the_step(unscale_first, device):
    bag = Bag([(3, 50), (4, 3, 3, 3), (9,)])
    oracle = Oracle(bag.parameters(), 0.05, SETTINGS)
    params = arrange(bag, "flat", device)
    optimizer = AgcSgd(params, lr=0.05, implementation="fused", **SETTINGS)
    scaler = torch.amp.GradScaler(device, init_scale=3000.0, growth_interval=2)
    for step in range(6):
        grads = gradients(params, step, device=device)
        scale = scaler.scale(torch.ones((), device=device)).item()
        give(params, [g * scale for g in grads], "flat")
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        oracle.step(grads)
    assert scaler.get_scale() == 3000.0 * 8
    assert_close(params, oracle.params, 1e-6)


class NoReading(TorchDispatchMode):
    """Fails where the host reads a value, which on a GPU means to wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func), f"the host reads: {func}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["flat", "list"])
def test_a_step_reads_nothing_back(layout):
    params = arrange(Bag([(3, 50), (9,), ()]), layout)
    optimizer = AgcSgd(params, lr=torch.tensor(0.1), implementation="fused")
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    for step in range(2):
        give(params, gradients(params, step), layout)
        with NoReading():
            optimizer.step()


def states(optimizer, params):
    return [optimizer.state[p]["momentum_buffer"] for p in params]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("first", ["flat fused", "list fused", "list foreach"])
@pytest.mark.parametrize("second", ["flat fused", "list fused", "flat foreach"])
def test_a_state_of_one_path_goes_on_in_another(first, second, channels_last, device, tmp_path):
    runs = []
    for path in (first, second):
        layout, implementation = path.split()
        params = arrange(Bag([(3, 50), (4, 3, 3, 3), (9,), (), (0, 2)], channels_last=channels_last), layout, device)
        runs.append((params, AgcSgd(params, lr=0.05, implementation=implementation, **SETTINGS), layout))
    (params, optimizer, layout), (others, other, other_layout) = runs
    for step in range(3):
        give(params, gradients(params, step, device=device), layout)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True, map_location="cpu")
    assert [set(entry) for entry in saved["state"].values()] == [{"momentum_buffer"}] * len(params)
    other.load_state_dict(saved)
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    for step in range(3, 6):
        give(params, gradients(params, step, device=device), layout)
        give(others, gradients(others, step, device=device), other_layout)
        optimizer.step()
        other.step()
    assert_close(others, params, 1e-6)
    assert_close(states(other, others), states(optimizer, params), 1e-6)
    assert all(m.stride() == p.stride() for p, m in zip(others, states(other, others), strict=True) if p.numel())


def test_gradients_that_come_go_and_move():
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = AgcSgd(params, lr=0.1, implementation="fused", **SETTINGS)
    twin = AgcSgd(twins, lr=0.1, implementation="foreach", **SETTINGS)
    for present in ((True, False), (True, True), (False, True), (True, True)):
        for p, q, here in zip(params, twins, present, strict=True):
            p.grad = torch.full_like(p, 0.5).t() if here else None  # a transposed layout where there is one
            q.grad = torch.full_like(q, 0.5) if here else None
        optimizer.step()
        twin.step()
        assert_close(params, twins, 1e-6)
        assert [p in optimizer.state for p in params] == [q in twin.state for q in twins]


def test_settings_that_change_between_steps():
    params, twins = ([nn.Parameter(torch.ones(shape)) for shape in ((4, 3000), (7,))] for _ in range(2))
    optimizer = AgcSgd(params, lr=0.1, implementation="fused", **SETTINGS | {"clipping": None})
    twin = AgcSgd(twins, lr=0.1, implementation="foreach", **SETTINGS | {"clipping": None})
    for change in ({}, {"clipping": 0.01}, {"momentum": 0.5, "eps": 2.0}, {"weight_decay": 0.1}, {"nesterov": False}):
        optimizer.param_groups[0].update(change)
        twin.param_groups[0].update(change)
        for p, q, g in zip(params, twins, gradients(params, 1), strict=True):
            p.grad, q.grad = g, g.clone()
        optimizer.step()
        twin.step()
        assert_close(params, twins, 1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_flat_storage_of_a_network_is_one_call(device):
    model = bit.build("R11x0.25-32px", 10, zero_head=False)
    twin = copy.deepcopy(model).to(device)
    params = arrange(model, "flat", device)
    optimizer = AgcSgd(named_groups(model, 1e-3, "norm_bias"), lr=0.1, implementation="fused")
    reference = AgcSgd(named_groups(twin, 1e-3, "norm_bias"), lr=0.1, implementation="foreach")
    for step in range(3):
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = reference.param_groups[index]["lr"] = 0.1 / (1 + step + index)
        grads = gradients(params, step, device=device)
        give(params, grads, "flat")
        give(list(twin.parameters()), [g.clone() for g in grads], "list")
        optimizer.step()
        reference.step()
    assert [type(call) for call in optimizer._plan.calls] == [FlatCall]
    assert_close(params, list(twin.parameters()), 1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_learning_rate_on_the_device(device):
    results = []
    for rates in ((0.05, 0.02), (torch.tensor(0.05, device=device), 0.02), [torch.tensor(0.05, device=device)] * 2):
        params = arrange(Bag([(3, 50), (9,)]), "list", device)
        groups = [{"params": params[:1], "lr": rates[0]}, {"params": params[1:], "lr": rates[1]}]
        optimizer = AgcSgd(groups, lr=1.0, implementation="fused", **SETTINGS)
        give(params, gradients(params, 0, device=device), "list")
        optimizer.step()
        results.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert torch.equal(results[0][0], results[2][0])
    assert not torch.equal(results[0][1], results[2][1])


def test_the_choice_of_implementation(monkeypatch):
    p = nn.Parameter(torch.ones(4, 3))
    assert AgcSgd([p], lr=0.1).implementation == "fused"
    assert AgcSgd([nn.Parameter(torch.ones(2).double())], lr=0.1).implementation == "foreach"
    assert AgcSgd([nn.Parameter(torch.ones(3, 4).t())], lr=0.1).implementation == "foreach"
    with pytest.raises(UserError, match="float64; float32 expected"):
        AgcSgd([nn.Parameter(torch.ones(2).double())], lr=0.1, implementation="fused")
    with pytest.raises(UserError, match="one piece of memory"):
        AgcSgd([nn.Parameter(torch.ones(3, 4).t())], lr=0.1, implementation="fused")
    p.grad_dtype = torch.float64
    p.grad = torch.ones(4, 3, dtype=torch.float64)
    with pytest.raises(UserError, match="gradients, found torch.float64"):
        AgcSgd([p], lr=0.1).step()
    monkeypatch.setattr(compiled, "loaded", lambda: False)
    assert AgcSgd([p], lr=0.1).implementation == "foreach"
    with pytest.raises(UserError, match="setup.py build_ext"):
        AgcSgd([p], lr=0.1, implementation="fused")
    monkeypatch.undo()
    monkeypatch.setattr(compiled, "supports", lambda device, operator: False)
    with pytest.raises(UserError, match="without a kernel for cpu.*BOOSTERBIT_CUDA=1"):
        AgcSgd([p], lr=0.1, implementation="fused")
    monkeypatch.undo()
    optimizer = copy.deepcopy(AgcSgd([nn.Parameter(torch.ones(2))], lr=0.1, implementation="foreach"))
    assert optimizer.implementation == "foreach"
