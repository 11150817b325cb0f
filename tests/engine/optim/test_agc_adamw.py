"""AdamW behind AGC with a moving average: against float64, torch's AdamW, and the fallback."""

import copy

import pytest
import torch
from torch import nn

from engine import compiled
from engine.network import bit
from engine.optim import AgcAdamW, named_groups
from engine.optim.fused import ForwardWeights
from engine.optim.plan import FlatCall, ListCall
from loaders.errors import UserError
from tests.support.agc_cases import (
    ADAMW,
    AdamWOracle,
    Bag,
    arrange,
    assert_close,
    assert_states_close,
    give,
    gradients,
    odd_shapes,
)

built = pytest.mark.skipif(not compiled.loaded(), reason="engine._C is not built: python setup.py build_ext --inplace")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
STATES = ("exp_avg", "exp_avg_sq", "ema")
PATHS = [pytest.param("fused", marks=built), "foreach"]


def check(optimizer, params, oracle, tolerance=1e-6):
    assert_close(params, oracle.params, tolerance, "parameter")
    for index, name in enumerate(STATES):
        found = [optimizer.state[p][name] for p in params]
        assert_states_close(found, [states[index] for states in oracle.states], index)


@built
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["flat", "list"])
def test_a_hundred_steps_against_the_oracle(layout, device):
    bag = Bag(odd_shapes(), channels_last=True)
    oracle = AdamWOracle(bag.parameters(), ADAMW)
    params = arrange(bag, layout, device)
    optimizer = AgcAdamW(params, implementation="fused", **ADAMW)
    for step in range(100):
        grads = gradients(params, step % 7, device=device)
        give(params, grads, layout)
        optimizer.step()
        oracle.step(grads)
        assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
    assert [type(call) for call in optimizer._plan.calls] == [FlatCall if layout == "flat" else ListCall]
    check(optimizer, params, oracle)
    assert all(optimizer.state[p]["step"] == 100 for p in params)


@built
@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.95, 0.9999), (0.4, 0.999)])
def test_other_settings(betas):
    settings = ADAMW | {"betas": betas, "clipping": 0.3, "eps": 1e-4, "ema_decay": 0.9999, "weight_decay": 0.1}
    params = arrange(Bag([(3, 500), (40, 147), (700,)]), "flat")
    oracle = AdamWOracle(params, settings)
    optimizer = AgcAdamW(params, **settings)
    for step in range(20):
        grads = gradients(params, step)
        give(params, grads, "flat")
        optimizer.step()
        oracle.step(grads)
    check(optimizer, params, oracle)


@built
@pytest.mark.parametrize("size", [1e-15, 1e30])
def test_gradients_of_any_size(size):
    """Clipped ones are as of any other size; of those that are not, a square may be more than float32 holds, and the
    run must stay finite."""
    params = arrange(Bag([(3, 50), (40,), (2, 25000)]), "list")
    oracle = AdamWOracle(params, ADAMW)
    optimizer = AgcAdamW(params, **ADAMW)
    free = AgcAdamW([nn.Parameter(torch.ones(30))], **ADAMW | {"clipping": None})
    for step in range(5):
        random = torch.Generator().manual_seed(step)
        grads = [size * torch.randn(p.shape, generator=random) for p in params]
        give(params, grads, "list")
        optimizer.step()
        oracle.step(grads)
        only = free.param_groups[0]["params"]
        only[0].grad = torch.full((30,), size)
        free.step()
    check(optimizer, params, oracle)
    assert only[0].isfinite().all()


@built
@pytest.mark.parametrize("copy_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_gradients_and_copies(copy_dtype):
    bag = Bag(odd_shapes())
    oracle = AdamWOracle(bag.parameters(), ADAMW)
    params = arrange(bag, "list")
    copies = [torch.full_like(p.detach(), float("nan"), dtype=copy_dtype) for p in params]
    optimizer = AgcAdamW(params, forward_weights=ForwardWeights(dict(zip(params, copies, strict=True))), **ADAMW)
    for step in range(5):
        grads = gradients(params, step, torch.bfloat16)
        give(params, grads, "list")
        optimizer.step()
        oracle.step(grads)
    assert all(torch.equal(c, p.detach().to(copy_dtype)) for p, c in zip(params, copies, strict=True))
    check(optimizer, params, oracle)
    before = [c.clone() for c in copies]
    with optimizer.averaged():
        assert all(torch.equal(p, optimizer.state[p]["ema"]) for p in params)
        assert all(torch.equal(c, p.detach().to(copy_dtype)) for p, c in zip(params, copies, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, copies, strict=True))


@built
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["flat", "list"])
def test_standardized_rows_and_their_averages(layout, device):
    eps, shapes = 1e-10, [(3, 500), (4, 3, 3, 3), (6, 20000), (70,)]
    bag = Bag(shapes)
    oracle = AdamWOracle(bag.parameters(), ADAMW, [eps if len(shape) > 1 else -1.0 for shape in shapes])
    params = arrange(bag, layout, device)
    if layout == "flat":
        buffer = torch.zeros(params[0].untyped_storage().nbytes() // 4, device=device)
        copies = [buffer.as_strided(p.shape, p.stride(), p.storage_offset()) for p in params]
    else:
        copies = [torch.zeros_like(p) for p in params]
    rows = frozenset(p for p in params if p.ndim > 1)
    weights = ForwardWeights(dict(zip(params, copies, strict=True)), rows, eps)
    optimizer = AgcAdamW(params, forward_weights=weights, **ADAMW)
    for step in range(10):
        grads = gradients(params, step, device=device)
        give(params, grads, layout)
        optimizer.step()
        oracle.step(grads)
    assert_close(params, oracle.params, 5e-6)
    assert_close(copies, oracle.copies, 5e-6, "copy")
    before = [c.clone() for c in copies]
    with optimizer.averaged():
        for p, c in zip(params, copies, strict=True):
            ema = optimizer.state[p]["ema"].double()
            expected = (ema - ema.mean((1,) if p.ndim == 2 else (1, 2, 3), keepdim=True)) if p.ndim > 1 else ema
            if p.ndim > 1:
                expected = expected / (expected.flatten(1).square().mean(1) + eps).sqrt().view(-1, *[1] * (p.ndim - 1))
            assert_close([c], [expected], 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, copies, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_without_clipping_it_is_torchs_adamw(path):
    torch.manual_seed(0)
    params = list(Bag([(30, 50), (4, 3, 3, 3), (9,)]).parameters())
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    settings = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = AgcAdamW(params, clipping=None, ema_decay=0.9, implementation=path, **settings)
    reference = torch.optim.AdamW(twins, **settings)
    averages = torch.optim.swa_utils.AveragedModel(
        nn.ParameterList(twins), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    averages.n_averaged += 1  # begun with the parameters before the first step, as ours
    for step in range(10):
        for p, q, g in zip(params, twins, gradients(params, step), strict=True):
            p.grad, q.grad = g, g.clone()
        optimizer.step()
        reference.step()
        averages.update_parameters(nn.ParameterList(twins))
    assert_close(params, twins, 2e-6)
    assert_close([optimizer.state[p]["ema"] for p in params], list(averages.parameters()), 2e-6)


@pytest.mark.parametrize("path", PATHS)
def test_a_state_of_torchs_adamw_goes_on_and_goes_back(path):
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(4, 3) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1, betas=(0.8, 0.95), weight_decay=0.1)
    optimizer = AgcAdamW(ours.parameters(), lr=0.3, clipping=None, ema_decay=0.5, implementation=path)
    optimizer.load_state_dict(reference.state_dict())
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
    assert optimizer.param_groups[0]["clipping"] is None
    assert "amsgrad" not in optimizer.param_groups[0]
    reference.load_state_dict(optimizer.state_dict())
    assert reference.state[theirs.weight]["step"] == 4
    assert torch.equal(reference.state[theirs.weight]["exp_avg_sq"], optimizer.state[ours.weight]["exp_avg_sq"])


@built
@pytest.mark.parametrize("first", ["flat fused", "list fused", "list foreach"])
@pytest.mark.parametrize("second", ["flat fused", "list fused", "flat foreach"])
def test_a_state_of_one_path_goes_on_in_another(first, second, tmp_path):
    runs = []
    for path in (first, second):
        layout, implementation = path.split()
        params = arrange(Bag([(3, 50), (4, 3, 3, 3), (90,), (), (0, 2)], channels_last=True), layout)
        runs.append((params, AgcAdamW(params, implementation=implementation, **ADAMW), layout))
    (params, optimizer, layout), (others, other, other_layout) = runs
    for step in range(3):
        give(params, gradients(params, step), layout)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True, map_location="cpu")
    other.load_state_dict(saved)
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    for step in range(3, 6):
        for own, one, kind in ((params, optimizer, layout), (others, other, other_layout)):
            give(own, gradients(own, step), kind)
            one.step()
    assert_close(others, params, 1e-6)
    for name in ("exp_avg_sq", "ema", "step"):
        assert_close([other.state[p][name] for p in others], [optimizer.state[p][name] for p in params], 1e-6)
    assert saved["state"][0]["step"] == 3  # who loads a state does not count on in it


@pytest.mark.parametrize("path", PATHS)
def test_resumes_to_the_bit(path, tmp_path):
    def run(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
            optimizer.step()

    def made():
        model = bit.build("R8x0.25-8px", 4)
        return model, AgcAdamW(named_groups(model, 1e-2, "norm_bias"), ema_decay=0.9, implementation=path)

    model, optimizer = made()
    run(model, optimizer, range(3))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    run(model, optimizer, range(3, 5))
    saved = torch.load(tmp_path / "state", weights_only=True)
    resumed, continued = made()
    resumed.load_state_dict(saved["model"])
    continued.load_state_dict(saved["optimizer"])
    run(resumed, continued, range(3, 5))
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["ema"], continued.state[q]["ema"])


@built
def test_gradients_that_come_and_go_are_counted_for_each_parameter():
    params, twins = ([nn.Parameter(torch.ones(3, 40)), nn.Parameter(torch.ones(50))] for _ in range(2))
    optimizer = AgcAdamW(params, **ADAMW)
    assert optimizer.implementation == "fused"
    twin = AgcAdamW(twins, implementation="foreach", **ADAMW)
    for present in ((True, False), (True, True), (False, True), (True, True), (True, True)):
        for p, q, here in zip(params, twins, present, strict=True):
            p.grad = torch.full_like(p, 0.5) if here else None
            q.grad = torch.full_like(q, 0.5) if here else None
        optimizer.step()
        twin.step()
        assert_close(params, twins, 1e-6)
    assert [float(optimizer.state[p]["step"]) for p in params] == [4, 4]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2).double())]})  # which no kernel takes
    assert optimizer.implementation == "foreach"
    optimizer.step()
    twin.step()
    assert_close(params, twins, 1e-6)


@built
@pytest.mark.parametrize("layout", ["flat", "list"])
def test_scaled_gradients_and_overflow(layout):
    params = arrange(Bag([(3, 50), (4, 3, 3, 3), (90,)]), layout)
    oracle = AdamWOracle(params, ADAMW)
    optimizer = AgcAdamW(params, implementation="fused", **ADAMW)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=2)
    for step in range(6):
        grads = gradients(params, step)
        scale = scaler.scale(torch.ones(())).item()
        give(params, [g * scale for g in grads], layout)
        if step == 3:
            params[0].grad[1, 2] = float("inf")
        else:
            oracle.step(grads)
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[params[0]]["step"] == 5
    check(optimizer, params, oracle)


def test_half_parameters_keep_an_average_of_32_bits(tmp_path):
    p = nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
    optimizer = AgcAdamW([p], lr=1e-3, ema_decay=0.999)
    assert optimizer.implementation == "foreach"
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    ema = optimizer.state[p]["ema"]
    assert ema.dtype == torch.float32
    other = AgcAdamW([nn.Parameter(p.detach().clone())], ema_decay=0.999)
    other.load_state_dict(optimizer.state_dict())
    (state,) = other.state.values()
    assert torch.equal(state["ema"], ema)
    assert state["ema"] is not ema


def test_schedules_of_torch_turn_its_settings():
    p = nn.Parameter(torch.ones(4, 3))
    optimizer = AgcAdamW([p], implementation="auto")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=5)
    for _ in range(4):
        p.grad = torch.ones_like(p)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["betas"][0] != 0.9
    assert p.isfinite().all()


def test_averages_are_in_their_place_only_within(tmp_path):
    p = nn.Parameter(torch.zeros(3))
    optimizer = AgcAdamW([p], lr=1.0, weight_decay=0.0, clipping=None, ema_decay=0.75)
    with pytest.raises(UserError, match="set ema_decay"), optimizer.averaged():
        pass
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(KeyError), optimizer.averaged():
        torch.testing.assert_close(p.detach(), torch.full((3,), -0.25))
        raise KeyError
    torch.testing.assert_close(p.detach(), torch.full((3,), -1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"betas": (0.9, 1.0)}, "betas is"), ({"betas": 0.9}, "betas is"), ({"betas": (0.9, float("nan"))}, "betas is"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"), ({"ema_decay": "slow"}, "ema_decay is 'slow'"),
        ({"eps": -1}, "eps is"), ({"clip_eps": -1}, "clip_eps is"), ({"clipping": 0}, "clipping is 0"),
        ({"lr": None}, "lr is None"),
        ({"weight_decay": float("inf")}, "weight_decay is inf"), ({"implementation": "fast"}, "implementation is"),
    ],
)  # fmt: skip
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        AgcAdamW([nn.Parameter(torch.ones(2))], **change)


def test_states_that_do_not_fit():
    p = [nn.Parameter(torch.ones(2))]
    for other, message in (
        (torch.optim.AdamW(p, amsgrad=True), "amsgrad=True"),
        (torch.optim.AdamW(p, maximize=True), "maximize=True"),
        (torch.optim.Adam(p, weight_decay=0.1), "is of Adam"),
    ):
        with pytest.raises(UserError, match=message):
            AgcAdamW(p).load_state_dict(other.state_dict())
    AgcAdamW(p).load_state_dict(torch.optim.Adam(p).state_dict())  # without decay they are the same
    with pytest.raises(UserError, match=r"write AgcAdamW\(named_groups\(model"):
        AgcAdamW(nn.Linear(2, 2))
