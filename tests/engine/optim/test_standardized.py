"""Weight standardization in the optimizer against autograd through the network, in float64."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine import compiled
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.network import bit
from engine.optim.agc_sgd import AgcSgd
from engine.optim.flat import FlatParameters
from engine.optim.fused import ForwardWeights
from engine.optim.gradients import GradientSum
from engine.optim.groups import named_groups
from engine.optim.plan import FlatCall
from engine.optim.standardized import StandardizedWeights, choose
from loaders.errors import UserError
from tests.support.agc_cases import SETTINGS, Bag, Oracle, assert_close, gradients

pytestmark = pytest.mark.skipif(
    not compiled.loaded(), reason="engine._C is not built: python setup.py build_ext --inplace"
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NETWORK = "R8x0.25-8px"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("clipping", [0.01, None])
def test_a_hundred_steps_of_rows_against_autograd(clipping, device):
    """Gradients of standardized weights, pushed through the derivative of standardization by autograd in float64."""
    settings = SETTINGS | {"clipping": clipping}
    shapes = [(7, 9), (5, 27), (6, 64), (4, 3, 7, 7), (3, 1152), (3, 4608), (2, 20000), (9,)]
    bag = Bag(shapes)
    eps = [bit.STD_EPS if len(shape) > 1 else None for shape in shapes]
    params = [nn.Parameter((0.05 + 0.1 * p.detach()).to(device)) for p in bag.parameters()]
    oracle = Oracle(params, 0.01, settings, eps)
    copies = {p: torch.empty_like(p.detach()) for p in params}
    weights = ForwardWeights(copies, frozenset(p for p in params if p.ndim > 1), bit.STD_EPS)
    optimizer = AgcSgd(params, lr=0.01, forward_weights=weights, **settings)
    for step in range(100):
        grads = gradients(params, step % 5, device=device)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        oracle.step(grads)
    assert_close(params, oracle.params, 1e-6, "parameter")
    # Unclipped, these gradients drive the weights until they lie along them. What is then left of the difference has
    # the rounding of the float32 weights in it: 2e-5 here, and as much when torch computes it in float32.
    tolerance = 2e-6 if clipping else 5e-5
    assert_close([optimizer.state[p]["momentum_buffer"] for p in params], oracle.momenta, tolerance, "momentum")
    assert_close(list(copies.values()), oracle.copies, 2e-6, "copy")


def test_rows_that_do_not_vary():
    """One element, or all alike: the standardized row is 0, and so is the gradient."""
    params = [
        nn.Parameter(torch.full((2, 1), 3.0)),
        nn.Parameter(torch.full((2, 8), 0.5)),
        nn.Parameter(torch.zeros(2, 8)),
    ]
    copies = {p: torch.full_like(p.detach(), float("nan")) for p in params}
    optimizer = AgcSgd(params, lr=0.1, forward_weights=ForwardWeights(copies, frozenset(params), bit.STD_EPS))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [p.detach().unique().tolist() for p in params] == [[3.0], [0.5], [0.0]]
    assert all(not copy.any() for copy in copies.values())


class Run:
    """A small BiT trained on random images: as `fused`, `plain` (standardizing in each pass), or `plain` in float64."""

    def __init__(self, fused, dtype=torch.float32, device="cpu", compute=torch.float32):
        torch.manual_seed(0)
        self.model = bit.build(NETWORK, 4, zero_head=False).to(device, dtype)
        self.device, self.dtype, self.compute = device, dtype, compute
        groups = named_groups(self.model, 1e-3)
        settings = {"lr": 0.02, "clipping": 0.02}
        self.standardized = None
        if fused:
            self.flat = FlatParameters(self.model, channels_last=True)
            self.standardized = StandardizedWeights(self.model, self.flat, compute)
            settings["forward_weights"] = self.standardized.forward_weights
        elif dtype == torch.float32:
            self.flat = FlatParameters(self.model, channels_last=True)
        self.gradients = None
        if fused or dtype == torch.float32:
            self.gradients = GradientSum(self.flat, Communicator(Launch("alone")), 2**20)
        self.optimizer = AgcSgd(groups, implementation="fused" if fused else "foreach", **settings)

    def train(self, first, last):
        for step in range(first, last):
            random = torch.Generator().manual_seed(step % 10)
            images = torch.randn(16, 3, 8, 8, generator=random).to(self.device, self.dtype)
            labels = torch.randint(0, 4, (16,), generator=random).to(self.device)
            with torch.autocast(self.device, dtype=self.compute, enabled=self.compute != torch.float32):
                logits = self.model(images)
            self.loss = nn.functional.cross_entropy(logits.to(self.dtype), labels)
            if self.gradients is None:
                self.model.zero_grad()
                self.loss.backward()
            else:
                with self.gradients.during_backward():
                    self.loss.backward()
            self.optimizer.step()
        return self

    def error(self, other):
        """Largest relative distance of a parameter's row from that of `other`, in float64."""
        worst = 0.0
        for p, q in zip(self.model.parameters(), other.model.parameters(), strict=True):
            p, q = (x.detach().cpu().double().reshape(len(x) if x.ndim > 1 else 1, -1) for x in (p, q))
            worst = max(worst, ((p - q).norm(dim=1) / q.norm(dim=1)).max().item())
        return worst


@pytest.mark.parametrize("device", DEVICES)
def test_a_hundred_training_steps_are_as_exact_as_without(device, monkeypatch):
    # A smooth activation: a ReLU that rounding puts on the other side of its kink changes a gradient by 1e-3.
    def forward(self, x, *, shortcut=False):
        out = nn.functional.silu(nn.GroupNorm.forward(self, x))
        return (out, x) if shortcut else out

    monkeypatch.setattr(bit.GroupNormReLU, "forward", forward)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    oracle = Run(fused=False, dtype=torch.float64, device=device).train(0, 100)
    plain = Run(fused=False, device=device).train(0, 100)
    fused = Run(fused=True, device=device).train(0, 100)
    start = Run(fused=False, dtype=torch.float64, device=device)
    assert start.error(oracle) > 0.1
    assert oracle.loss.item() < 0.8 < start.train(0, 1).loss.item()  # it did learn
    # Both compute the network in float32; standardization in the optimizer adds no error to that.
    assert fused.error(oracle) < 2 * plain.error(oracle)
    assert fused.error(oracle) < 5e-6
    assert [type(call) for call in fused.optimizer._plan.calls] == [FlatCall]


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_kernels_feed_float32_gradients(device):
    plain = Run(fused=False, device=device, compute=torch.bfloat16).train(0, 20)
    fused = Run(fused=True, device=device, compute=torch.bfloat16).train(0, 20)
    conv = fused.model.root.conv
    assert conv.standardized.dtype == torch.bfloat16
    assert conv.weight.grad.dtype == conv.weight.dtype == torch.float32
    assert conv.standardized.grad is None  # what autograd gave, in half precision, is in the buffer and let go
    oracle = Run(fused=False, dtype=torch.float64, device=device).train(0, 20)
    assert fused.error(oracle) < 2 * plain.error(oracle)


def test_the_forward_pass_reads_what_the_step_wrote_and_nothing_else():
    run = Run(fused=True).train(0, 2)
    expected = copy.deepcopy(run.model)
    for module in expected.modules():
        if isinstance(module, bit.StdConv2d):
            module.standardized = None
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(run.model(x), expected(x), rtol=1e-4, atol=1e-5)
    run.model.root.conv.standardized.detach().zero_()
    assert not torch.allclose(run.model(x), expected(x))


def test_derived_weights_are_those_of_the_step_to_the_bit():
    run = Run(fused=True, compute=torch.bfloat16).train(0, 3)
    before = run.standardized._copies.clone()
    run.standardized._copies.fill_(float("nan"))
    run.standardized.refresh()
    used = torch.zeros(len(before), dtype=torch.bool)
    for slot in run.flat.slots:
        used[slot.offset : slot.offset + slot.numel] = True
    assert torch.equal(before[used], run.standardized._copies[used])


def test_a_resumed_run_is_the_run_that_never_stopped():
    whole = Run(fused=True).train(0, 6)
    first = Run(fused=True).train(0, 3)
    file = io.BytesIO()
    torch.save({"model": first.model.state_dict(), "optimizer": first.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    raw = dict(first.model.named_parameters())
    assert set(saved["model"]) == set(raw)
    assert all(torch.equal(saved["model"][name], p) for name, p in raw.items())
    second = Run(fused=True)
    second.model.load_state_dict(saved["model"])  # derives the standardized weights anew
    second.optimizer.load_state_dict(saved["optimizer"])
    second.train(3, 6)
    assert torch.equal(second.flat.values, whole.flat.values)


def test_a_run_goes_on_without_it_and_with_it():
    plain = Run(fused=False).train(0, 6)
    first = Run(fused=True).train(0, 3)
    second = Run(fused=False)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    assert second.train(3, 6).error(plain) < 1e-5
    third = Run(fused=True)
    start = Run(fused=False).train(0, 3)
    third.model.load_state_dict(start.model.state_dict())
    third.optimizer.load_state_dict(copy.deepcopy(start.optimizer.state_dict()))
    assert third.train(3, 6).error(plain) < 1e-5


def test_gradients_of_standardized_kernels_are_summed_over_ranks_while_backward_runs():
    log = []

    class Pair:
        size = 2

        def start_sum_(self, tensor, name):
            log.append(name)
            tensor.mul_(2)
            return SimpleNamespace(wait=lambda: None)

    run = Run(fused=True)
    gradients = GradientSum(run.flat, Pair(), slice_bytes=1)
    x = torch.randn(4, 3, 8, 8)
    with gradients.during_backward(last=False):
        run.model(x).square().sum().backward()
    single = run.flat.grads.clone()
    run.model.root.conv.standardized.register_hook(lambda _: log.append("first layer"))
    with gradients.during_backward():
        run.model(x).square().sum().backward()
    torch.testing.assert_close(run.flat.grads, 2 * single)
    assert len(log) == len(run.flat.slots) + 1
    assert log.index("first layer") >= len(run.flat.slots) - 1


def test_only_the_fused_optimizer_standardizes():
    config = pytest.importorskip("engine.config.schema", reason="the configuration's library is not installed")
    with pytest.raises(UserError, match="needs the fused optimizer"):
        config.AgcSgdConfig(standardize="optimizer", implementation="foreach")
    with pytest.raises(UserError, match="standardize=optimiser is unknown"):
        config.AgcSgdConfig(standardize="optimiser")
    with pytest.raises(UserError, match="fused implementation only"):
        AgcSgd([nn.Parameter(torch.ones(2))], lr=0.1, implementation="foreach", forward_weights=ForwardWeights({}))


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("implementation", ["auto", "fused", "foreach"])
@pytest.mark.parametrize("standardize", ["auto", "network"])
def test_the_optimizer_standardizes_by_itself_where_it_is_fused(monkeypatch, standardize, implementation, built):
    monkeypatch.setattr(compiled, "supports", lambda device, operator: built)
    model = bit.build(NETWORK, 4)
    found = choose(model, FlatParameters(model, channels_last=True), torch.float32, standardize, implementation)
    assert (found is not None) == (standardize == "auto" and implementation != "foreach" and built)
    assert (model.root.conv.standardized is not None) == (found is not None)


@pytest.mark.parametrize("implementation", ["auto", "fused"])
def test_the_optimizer_standardizes_where_it_is_told_to_or_says_why_not(monkeypatch, implementation):
    model = bit.build(NETWORK, 4)
    flat = FlatParameters(model, channels_last=True)
    assert choose(model, flat, torch.float32, "optimizer", implementation) is not None
    monkeypatch.setattr(compiled, "supports", lambda device, operator: False)
    with pytest.raises(UserError, match="built without a kernel for cpu"):
        choose(model, flat, torch.float32, "optimizer", implementation)
