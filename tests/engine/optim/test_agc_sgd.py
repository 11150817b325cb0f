import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from engine.network import bit
from engine.optim.agc_sgd import AgcSgd
from engine.optim.clipping import adaptive_clip, adaptive_clip_
from engine.optim.groups import named_groups
from loaders.errors import UserError
from tests.conftest import ROOT

SHAPES = [(), (1,), (7,), (0,), (5, 3), (1, 20), (20, 1), (0, 4), (3, 0), (4, 3, 3, 3), (6, 5, 1, 1), (2, 3, 4)]


def norm(values):
    return math.sqrt(math.fsum(v * v for v in values))


def oracle_clip(param, grad, clipping, eps):
    """Plain loops in double precision over units of a parameter."""
    p, g = param.double(), grad.double().clone()
    for pu, gu in zip(p, g, strict=True) if p.ndim > 1 else [(p, g)]:
        limit = clipping * max(norm(pu.flatten().tolist()), eps)
        size = norm(gu.flatten().tolist())
        if size > limit:
            gu *= limit / max(size, 1e-6)
    return g


class Oracle:
    """The optimizer in double precision, one parameter at a time."""

    def __init__(self, params, lr, momentum, weight_decay, nesterov, clipping, eps):
        self.params = [p.detach().double().clone() for p in params]
        self.buffers = [None] * len(params)
        self.settings = lr, momentum, weight_decay, nesterov, clipping, eps

    def step(self, grads):
        lr, momentum, weight_decay, nesterov, clipping, eps = self.settings
        for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            g = g.double() if clipping is None else oracle_clip(p, g, clipping, eps)
            g = g + weight_decay * p
            self.buffers[i] = g.clone() if self.buffers[i] is None else momentum * self.buffers[i] + g
            p -= lr * (g + momentum * self.buffers[i] if nesterov else self.buffers[i])


def parameters(dtype=torch.float32):
    params = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    params.append(torch.randn(4, 3, 3, 3, dtype=dtype).to(memory_format=torch.channels_last))
    params += [torch.zeros(3, 4, dtype=dtype), torch.zeros(5, dtype=dtype)]
    return [nn.Parameter(p) for p in params]


def gradients(params, step):
    """Some rows far over the limit, some far under it, some zero."""
    generator = torch.Generator().manual_seed(step)
    grads = []
    for p in params:
        g = torch.randn(p.shape, generator=generator) * 10 ** torch.empty(p.shape).uniform_(-4, 0, generator=generator)
        if p.ndim > 1 and step % 3 == 0:
            g[::2] = 0
        grads.append(g.to(p.dtype).to(memory_format=torch.preserve_format))
    return grads


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("clipping", [0.01, 0.3, None])
def test_against_the_oracle(clipping, nesterov):
    torch.manual_seed(0)
    params = parameters()
    settings = {"momentum": 0.9, "weight_decay": 1e-3, "nesterov": nesterov, "clipping": clipping, "eps": 1e-3}
    optimizer = AgcSgd(params, lr=0.1, **settings)
    oracle = Oracle(params, lr=0.1, **settings)
    for step in range(20):
        grads = gradients(params, step)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        oracle.step(grads)
        assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
    for p, expected in zip(params, oracle.params, strict=True):
        torch.testing.assert_close(p.double(), expected, rtol=2e-6, atol=2e-7)


def test_against_timm_and_torch():
    agc = pytest.importorskip("timm.utils.agc", reason="timm, the reference, is not installed")
    torch.manual_seed(0)
    ours = bit.build("R8x0.25-8px", 5, zero_head=False)
    theirs = copy.deepcopy(ours)
    theirs.to(memory_format=torch.channels_last)
    optimizer = AgcSgd(named_groups(ours, 1e-3), lr=0.2, clipping=0.02, eps=1e-2)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3, nesterov=True)
    body = [p for name, p in theirs.named_parameters() if not name.startswith("head.conv")]
    clipped = 0
    for _ in range(20):
        images, labels = torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(ours(images), labels).backward()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = p.grad.clone()  # the same gradients: the network's rounding is not under test
        agc.adaptive_clip_grad(body, clip_factor=0.02, eps=1e-2, norm_type=2.0)
        clipped += sum(
            not torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)
        )
        optimizer.step()
        reference.step()
    assert clipped > 100
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_units():
    p, g = torch.ones(3, 4), torch.ones(3, 4)
    g[1] *= 1e-3  # rows of p have norm 2, so the limit is 0.02: row 1's 2e-3 stays
    (clipped,) = adaptive_clip([p], [g], 0.01, 1e-3)
    torch.testing.assert_close(clipped.norm(dim=1), torch.tensor([0.02, 2e-3, 0.02]))
    (whole,) = adaptive_clip([torch.ones(4)], [torch.ones(4)], 0.01, 1e-3)
    torch.testing.assert_close(whole.norm(), torch.tensor(0.02))
    (floor,) = adaptive_clip([torch.zeros(2, 9)], [torch.ones(2, 9)], 0.01, 1e-3)
    torch.testing.assert_close(floor.norm(dim=1), torch.full((2,), 1e-5))


def test_at_the_threshold_and_below_the_smallest_norm():
    p = torch.full((1, 1), 4.0)
    (exact,) = adaptive_clip([p], [torch.full((1, 1), 2.0)], 0.5, 1e-3)
    assert exact.item() == 2.0
    # limit 1e-9: a norm of 5e-10 is under it and stays, one of 5e-8 is over it and is divided by 1e-6, not by
    # itself
    (under, over) = adaptive_clip(
        [torch.zeros(1, 1)] * 2, [torch.full((1, 1), 5e-10), torch.full((1, 1), 5e-8)], 1e-6, 1e-3
    )
    assert under.item() == pytest.approx(5e-10)
    assert over.item() == pytest.approx(5e-8 * 1e-9 / 1e-6)
    (tiny, huge) = adaptive_clip([p, p], [torch.full((1, 1), 1e-30), torch.full((1, 1), 1e15)], 0.01, 1e-3)
    assert (tiny.item(), huge.item()) == (pytest.approx(1e-30), pytest.approx(0.04))


def test_channels_last_units_are_rows_not_memory():
    p, g = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    (expected,) = adaptive_clip([p], [g], 0.01, 1e-3)
    last = {"memory_format": torch.channels_last}
    (actual,) = adaptive_clip([p.to(**last)], [g.to(**last)], 0.01, 1e-3)
    torch.testing.assert_close(actual, expected)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    in_place = g.clone()
    adaptive_clip_([p], [in_place], 0.01, 1e-3)
    assert torch.equal(in_place, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_have_norms_in_single_precision(dtype):
    # The squares overflow half precision, and the sum of so many needs more than its bits.
    g = torch.full((1, 5000), 300.0, dtype=dtype)
    (clipped,) = adaptive_clip([torch.ones(1, 5000)], [g], 0.01, 1e-3)
    assert clipped.dtype == dtype
    torch.testing.assert_close(clipped.float().norm().item(), 0.01 * math.sqrt(5000), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    params = parameters(dtype)
    optimizer = AgcSgd(params, lr=0.1)
    oracle = Oracle(params, 0.1, 0.9, 0.0, True, 0.01, 1e-3)
    for step in range(3):
        grads = gradients(params, step)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        oracle.step(grads)
    tolerance = {torch.float16: 3e-3, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype]
    for p, expected in zip(params, oracle.params, strict=True):
        assert p.dtype == optimizer.state[p]["momentum_buffer"].dtype == dtype
        torch.testing.assert_close(p.double(), expected, rtol=tolerance, atol=tolerance)


def test_learning_rate_may_be_a_tensor():
    results = []
    for lr in (0.05, torch.tensor(0.05)):
        torch.manual_seed(3)
        params = parameters()
        optimizer = AgcSgd(params, lr=lr, weight_decay=1e-4)
        for step in range(3):
            for p, g in zip(params, gradients(params, step), strict=True):
                p.grad = g
            optimizer.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_without_momentum_it_is_gradient_descent():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    p.grad = torch.tensor([0.5, -0.5])
    optimizer = AgcSgd([p], lr=0.1, momentum=0.0, nesterov=False, clipping=None)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.95, 2.05]))
    assert not optimizer.state


def test_missing_gradients_are_left_alone():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = AgcSgd([p, q], lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(q, torch.ones(3))
    assert q not in optimizer.state
    q.grad = torch.ones(3)
    optimizer.step()  # q's first step beside p's second
    torch.testing.assert_close(
        optimizer.state[q]["momentum_buffer"], torch.full((3,), 0.1 + 0.01 * math.sqrt(3) / math.sqrt(3))
    )


def test_closure():
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = AgcSgd([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert p.item() < 3.0


def scaled_run(bad_step, scale_growth):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = AgcSgd(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=scale_growth)
    history = []
    for step in range(4):
        optimizer.zero_grad()
        loss = model(torch.full((3, 4), float(step + 1))).square().mean()
        scaler.scale(loss).backward()
        if step == bad_step:
            model[0].weight.grad[0, 0] = float("inf")
        before = [p.detach().clone() for p in model.parameters()]
        momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters() if p in optimizer.state]
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        kept = [optimizer.state[p]["momentum_buffer"] for p in model.parameters() if p in optimizer.state]
        same = same and all(torch.equal(a, b) for a, b in zip(momentum, kept, strict=False))
        history.append((same, scaler.get_scale()))
    return history, model


def test_scaler_skips_overflow_and_lowers_the_scale():
    history, _ = scaled_run(bad_step=2, scale_growth=100)
    assert [same for same, _ in history] == [False, False, True, False]
    assert [scale for _, scale in history] == [1024, 1024, 512, 512]


def test_scaling_does_not_change_the_result():
    _, model = scaled_run(bad_step=None, scale_growth=2)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = AgcSgd(plain.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        plain(torch.full((3, 4), float(step + 1))).square().mean().backward()
        optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def train(model, optimizer, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        images = torch.randn(4, 3, 8, 8, generator=generator)
        nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
        optimizer.step()


def test_resumes_to_the_bit(tmp_path):
    model = bit.build("R8x0.25-8px", 4)
    optimizer = AgcSgd(named_groups(model, 1e-4, "norm_bias"), lr=0.1)
    train(model, optimizer, 0, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    train(model, optimizer, 3, 6)
    saved = torch.load(tmp_path / "state", weights_only=True)
    resumed = bit.build("R8x0.25-8px", 4)
    resumed.load_state_dict(saved["model"])
    continued = AgcSgd(named_groups(resumed, 1e-4, "norm_bias"), lr=0.7)
    continued.load_state_dict(saved["optimizer"])
    train(resumed, continued, 3, 6)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_continues_from_torchs_sgd():
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(4, 3) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.8, weight_decay=1e-2, nesterov=True)
    optimizer = AgcSgd(ours.parameters(), lr=0.3, clipping=None)
    optimizer.load_state_dict(reference.state_dict())  # before its first step: no buffers
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.1, 0.8)
    for step in range(4):
        for model in (ours, theirs):
            model.zero_grad()
            model(torch.full((2, 4), step + 1.0)).square().sum().backward()
        optimizer.step()
        reference.step()
        if step == 1:
            optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    group = optimizer.param_groups[0]
    assert group["clipping"] is None
    assert "dampening" not in group
    # and back
    reference.load_state_dict(optimizer.state_dict())
    assert torch.equal(
        reference.state[theirs.weight]["momentum_buffer"], optimizer.state[ours.weight]["momentum_buffer"]
    )


def test_states_that_do_not_fit():
    model, other = bit.build("R8x0.25-8px", 4), bit.build("R11x0.25-32px", 4)
    optimizer = AgcSgd(named_groups(model, 0.0), lr=0.1)
    with pytest.raises(UserError, match="other parameters"):
        optimizer.load_state_dict(AgcSgd(named_groups(other, 0.0), lr=0.1).state_dict())
    with pytest.raises(UserError, match="other parameters"):
        optimizer.load_state_dict(AgcSgd(named_groups(model, 0.0, "norm_bias"), lr=0.1).state_dict())
    damped = torch.optim.SGD([torch.zeros(2)], lr=0.1, momentum=0.9, dampening=0.5)
    with pytest.raises(UserError, match="dampening=0.5"):
        AgcSgd([torch.zeros(2)], lr=0.1).load_state_dict(damped.state_dict())


def test_groups_by_name():
    model = bit.build("R11x0.25-32px", 64)  # head.conv is 64 x 256, as other layers might be
    body, head = named_groups(model, 1e-4)
    assert head["names"] == ["head.conv.weight", "head.conv.bias"]
    assert head["clipping"] is None
    assert head["weight_decay"] == body["weight_decay"] == 1e-4
    assert "clipping" not in body
    assert {"head.gn.weight", "root.conv.weight"} < set(body["names"])
    named = dict(model.named_parameters())
    for group in (body, head):
        assert all(named[name] is p for name, p in zip(group["names"], group["params"], strict=True))
    assert len(body["names"]) + len(head["names"]) == len(named)


def test_groups_without_decay():
    model = bit.build("R11x0.25-32px", 5)
    groups = named_groups(model, 1e-4, "norm_bias")
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    modules = dict(model.named_modules())
    for name, value in decay.items():
        module, leaf = name.rsplit(".", 1)
        expected = 0.0 if isinstance(modules[module], nn.GroupNorm) or leaf == "bias" else 1e-4
        assert value == expected, name
    unclipped = {name for g in groups if g.get("clipping", 0) is None for name in g["names"]}
    assert unclipped == {"head.conv.weight", "head.conv.bias"}
    assert len(decay) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out():
    model = bit.build("R8x0.25-8px", 5)
    model.root.requires_grad_(False)
    assert all("root.conv.weight" not in group["names"] for group in named_groups(model, 0.0))


def test_bad_requests():
    p = [nn.Parameter(torch.ones(2))]
    for change, message in {
        ("lr", -0.1): "lr is -0.1",
        ("lr", float("nan")): "lr is nan",
        ("lr", torch.ones(2)): "lr is a tensor",
        ("momentum", -1): "momentum is -1",
        ("weight_decay", -1): "weight_decay is -1",
        ("clipping", 0): "clipping is 0",
        ("lr", "0.1"): "lr is '0.1'; expected a number",
        ("lr", None): "lr is None",
        ("lr", float("inf")): "lr is inf",
        ("eps", float("nan")): "eps is nan",
        ("clipping", "low"): "clipping is 'low'",
        ("clipping", float("inf")): "clipping is inf",
        ("eps", -1): "eps is -1",
        ("momentum", 0): "nesterov needs",
        ("implementation", "fast"): "implementation is 'fast'",
    }.items():
        with pytest.raises(ValueError, match=message):
            AgcSgd(p, **({"lr": 0.1} | dict([change])))
    with pytest.raises(ValueError, match="complex64"):
        AgcSgd([nn.Parameter(torch.ones(2, dtype=torch.complex64))], lr=0.1)
    with pytest.raises(UserError, match="no_decay is 'bias'"):
        named_groups(bit.build("R8x0.25-8px", 5), 0.0, "bias")
    with pytest.raises(UserError, match="would be the classifier"):
        named_groups(nn.Linear(2, 2), 0.0)
    with pytest.raises(UserError, match=r"'heads'.*did you mean 'head'.*head=''"):
        named_groups(bit.build("R8x0.25-8px", 5), 0.0, head="heads")
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        AgcSgd(embedding.parameters(), lr=0.1).step()


def test_neither_saving_nor_resuming_imports_a_compiler():
    """Seconds for each rank, in the first save and at each start. What this torch's methods are wrapped in would."""
    code = """
import sys, torch
from engine.optim.agc_sgd import AgcSgd
optimizer = AgcSgd([torch.ones(3, requires_grad=True)], lr=0.1)
optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
torch.optim.Optimizer.state_dict(optimizer)
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
