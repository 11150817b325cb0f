"""What only a GPU can show: no host synchronisation, CUDA graphs, the number of launches, devices side by side.

Parity on the GPU is in test_fused.py and test_standardized.py, parametrized by device.
"""

import pytest
import torch

from bench.measured.kernel import launches
from bench.measured.training import Setup, build, synthetic
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.network import bit
from engine.optim import ops
from engine.optim.agc_adamw import AgcAdamW
from engine.optim.agc_sgd import AgcSgd
from engine.optim.flat import FlatParameters
from engine.optim.groups import named_groups
from engine.optim.standardized import StandardizedWeights
from tests.support.agc_cases import SETTINGS, Bag, Oracle, arrange, assert_close, give, gradients, odd_shapes

pytestmark = pytest.mark.gpu
NETWORK = "R20x0.5-32px"


def network(standardize=False):
    """A flat network on the GPU, its optimizer, and gradients."""
    torch.manual_seed(0)
    model = bit.build(NETWORK, 10, zero_head=False).cuda()
    flat = FlatParameters(model, channels_last=True)
    weights = StandardizedWeights(model, flat, torch.bfloat16).forward_weights if standardize else None
    optimizer = AgcSgd(named_groups(model, 1e-3, "norm_bias"), lr=0.1, implementation="fused", forward_weights=weights)
    flat.grads.normal_(std=0.01)
    return flat, optimizer


def test_auto_is_fused():
    assert AgcSgd([torch.nn.Parameter(torch.ones(3, 4, device="cuda"))], lr=0.1).implementation == "fused"


@pytest.mark.parametrize("standardize", [False, True])
def test_the_host_never_waits(standardize):
    flat, optimizer = network(standardize)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    scaler.scale(torch.ones((), device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(4):  # the first makes tables, and learning rates and settings change
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (1 + step)
                group["weight_decay"] = 1e-4 * step
            scaler.step(optimizer)
            scaler.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(flat.values).all()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_the_host_never_waits_in_a_training_step(precision):
    comm = Communicator(Launch("alone"))
    setup = Setup(NETWORK, batch=8, precision=precision, device="cuda", size=32, num_classes=10)
    trainer = build(setup, comm)
    source = synthetic(setup, comm, trainer.flat.values.device)
    micro_batches = next(source) + next(source)
    trainer.train_step(micro_batches)  # tables and algorithms are chosen
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.phases.start()
            trainer.phases.lap("input")
            trainer.train_step(micro_batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(trainer.flat.values).all()  # waits: all three are read now
    assert trainer.phases.read()["steps"] == 3


def test_lists_of_tensors_do_not_wait_either():
    params = arrange(Bag(odd_shapes()), "list", "cuda")
    optimizer = AgcSgd(params, lr=torch.tensor(0.1, device="cuda"), implementation="fused", **SETTINGS)
    steps = [gradients(params, step, device="cuda") for step in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for grads in steps:
            give(params, grads, "list")
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("standardize", [False, True])
def test_one_launch(standardize):
    _, optimizer = network(standardize)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")
    optimizer.step()
    assert launches(optimizer.step) == 1


def test_one_launch_for_a_list():
    params = arrange(Bag(odd_shapes()), "list", "cuda")
    optimizer = AgcSgd(params, lr=0.1, implementation="fused", **SETTINGS)
    give(params, gradients(params, 0, device="cuda"), "list")
    optimizer.step()
    assert launches(optimizer.step) == 1


def test_adamw_is_two_launches_and_nobody_waits():
    flat, _ = network()
    optimizer = AgcAdamW([{"params": flat.parameters}], ema_decay=0.99, implementation="fused")
    assert launches(optimizer.step) == 2
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.state[flat.parameters[0]]["step"] > 3
    assert all(each.rows for each in optimizer.clipped().values())


def test_more_tensors_than_one_launch_takes():
    shapes = [(2, 3)] * 1000
    bag = Bag(shapes)
    oracle = Oracle(bag.parameters(), 0.1, SETTINGS)
    params = arrange(bag, "list", "cuda")
    optimizer = AgcSgd(params, lr=0.1, implementation="fused", **SETTINGS)
    for step in range(3):
        grads = gradients(params, step, device="cuda")
        give(params, grads, "list")
        optimizer.step()
        oracle.step(grads)
    assert len(optimizer._plan.calls) == 2
    assert_close(params, oracle.params, 1e-6)


def test_a_captured_step_follows_device_scalars():
    bag = Bag([(3, 50), (4, 3, 3, 3), (9,), (3, 20000)])
    oracle = Oracle(bag.parameters(), 0.1, SETTINGS)
    params = arrange(bag, "flat", "cuda")
    lr = torch.tensor(0.1, device="cuda")
    optimizer = AgcSgd(params, lr=lr, implementation="fused", **SETTINGS)
    optimizer.grad_scale, optimizer.found_inf = torch.full((1,), 2.0, device="cuda"), torch.zeros(1, device="cuda")
    grads = gradients(params, 0, device="cuda")
    give(params, [2 * g for g in grads], "flat")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    oracle.step(grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(1, 6):
        lr.fill_(0.1 / step)
        oracle.lr = 0.1 / step
        grads = gradients(params, step, device="cuda")
        give(params, [2 * g for g in grads], "flat")
        graph.replay()
        oracle.step(grads)
    assert_close(params, oracle.params, 1e-6)
    before = [p.detach().clone() for p in params]
    optimizer.found_inf.fill_(1.0)
    graph.replay()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_another_stream():
    params = arrange(Bag([(300, 5000)]), "flat", "cuda")
    twins = arrange(Bag([(300, 5000)]), "flat", "cuda")
    stream = torch.cuda.Stream()
    for chosen, on in ((params, torch.cuda.current_stream()), (twins, stream)):
        give(chosen, gradients(chosen, 0, device="cuda"), "flat")
        optimizer = AgcSgd(chosen, lr=0.1, implementation="fused", **SETTINGS)
        torch.cuda.synchronize()
        with torch.cuda.stream(on):
            for _ in range(10):
                optimizer.step()
        on.synchronize()
    assert torch.equal(params[0], twins[0])


def test_the_same_bits_every_time():
    results = []
    for _ in range(2):
        params = arrange(Bag(odd_shapes()), "flat", "cuda")
        optimizer = AgcSgd(params, lr=0.1, implementation="fused", **SETTINGS)
        for step in range(3):
            give(params, gradients(params, step, device="cuda"), "flat")
            optimizer.step()
        results.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_unsorted_units_are_refused():
    x = torch.zeros(64, device="cuda")
    units = torch.tensor([[0, 64, 0, 0]], device="cuda")
    row = torch.tensor([[0.9, 0, 0.01, 1e-3, 1, -1]], device="cuda")
    with pytest.raises(RuntimeError, match="sorted by size class"):
        torch.ops.boosterbit.agc_sgd_(x, x.clone(), x.clone(), units, [], torch.ones(1, device="cuda"), row)


def test_a_table_on_the_host_is_refused():
    x = torch.zeros(64, device="cuda")
    table = ops.unit_table([ops.Region((64,), 0, 0)])
    row = torch.tensor([[0.9, 0, 0.01, 1e-3, 1, -1]], device="cuda")
    with pytest.raises(RuntimeError, match="units is on cpu"):
        torch.ops.boosterbit.agc_sgd_(
            x, x.clone(), x.clone(), table.units, table.classes, torch.ones(1, device="cuda"), row
        )
