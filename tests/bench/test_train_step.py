"""One process's training step: what it reports, on what counts it rests, and that timing does not change training."""

import json
from types import SimpleNamespace

import pytest
import torch

from bench import train_step
from bench.measured import compared, step, training
from bench.measured.training import Setup
from bench.peers import steps
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.network import bit, family, norm
from loaders.errors import UserError

SMALL = ["--model", "R8x0.25-8px", "--size", "8", "--batch", "4", "--warmup", "1", "--steps", "2", "--repeats", "3",
         "--device", "cpu"]  # fmt: skip
ALONE = Communicator(Launch("alone"))


def test_the_counts_are_the_known_ones():
    step.check_counts()
    assert family.cost("R50x1", 1000).training_flops == pytest.approx(24.3e9, rel=0.002)
    assert family.cost("R152x4", 1000).training_flops == pytest.approx(1096e9, rel=0.002)


def test_a_wrong_count_is_noticed(monkeypatch):
    monkeypatch.setitem(step.COUNTED, "R50x1", 8.1)  # the forward pass alone
    with pytest.raises(AssertionError, match="R50x1"):
        step.check_counts()


@pytest.mark.parametrize("data", ["synthetic", "pack"])
def test_what_it_reports(data, tmp_path, capsys, digits):
    place = data if data == "synthetic" else str(digits / "low-train.h5")
    train_step.main([*SMALL, "--classes", "5", "--data", place, "--json", str(tmp_path / "one.json")])
    out = capsys.readouterr().out
    for word in ("images/s", "forward", "backward", "optimizer", "MFU", "peak memory", "median of 3"):
        assert word in out
    result = json.loads((tmp_path / "one.json").read_text())
    found = result["measured"]
    assert found["images_per_second_low"] <= found["images_per_second"] <= found["images_per_second_high"]
    assert sum(found["share_percent"].values()) == pytest.approx(100)
    assert found["share_percent"]["backward"] > 0
    flops = family.cost("R8x0.25-8px", 5, 8).training_flops
    assert result["tflops_reached"] == pytest.approx(flops * found["images_per_second"] / 1e12)
    reached, peak = result["tflops_reached"], result["mfu_relative_to"]["tflops"]
    assert result["mfu_percent"] == pytest.approx(100 * reached / peak)
    assert {"cpu", "vectors", "cores", "load_before"} <= set(result["hardware"])
    assert result["versions"]["torch"] == torch.__version__


def test_its_profile_is_what_the_model_takes(tmp_path, capsys, monkeypatch):
    from bench import scaling

    monkeypatch.chdir(tmp_path)
    train_step.main([*SMALL, "--json", "one.json"])
    scaling.main(["--model-only", "--profile", "one.json", "--gpus", "16", "--json", "rows.json"])
    assert "measured by bench/train_step.py" in capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    rate = json.loads((tmp_path / "one.json").read_text())["profile"]["images_per_second"]
    assert rows[0]["images_per_second"] == pytest.approx(rate)


def test_timing_does_not_change_training():
    """The same weights as a loop in plain torch, without momentum's second step, makes of the same images."""
    setup = Setup("R8x0.25-8px", 4, "fp32", "cpu", size=8, num_classes=5, learning_rate=0.1)
    trainer = training.build(setup, ALONE)
    trainer.run(training.synthetic(setup, ALONE, torch.device("cpu")), 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setup.seed)
        plain = bit.build("R8x0.25-8px", 5)
    batch = training.images(range(4), setup, torch.device("cpu"))
    logits = plain(batch.images)
    torch.nn.functional.cross_entropy(logits, batch.labels).backward()
    # The head starts at zero: its gradient alone is not zero in the first step, and it is not clipped.
    weight = plain.head.conv.weight
    expected = -setup.learning_rate * 1.9 * weight.grad  # Nesterov's first step: gradient and momentum of it
    torch.testing.assert_close(trainer.model.head.conv.weight, expected, rtol=1e-4, atol=1e-6)


def test_losses_do_not_depend_on_micro_batches():
    whole = Setup("R8x0.25-8px", 8, "fp32", "cpu", size=8, num_classes=5, learning_rate=0.1)
    parts = Setup("R8x0.25-8px", 3, "fp32", "cpu", size=8, num_classes=5, learning_rate=0.1)
    found = [training.agreement_loss(setup, ALONE, 8, 4) for setup in (whole, parts)]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0][0] == pytest.approx(torch.log(torch.tensor(5.0)).item(), rel=1e-5)  # the head starts at zero
    assert found[0][3] < found[0][0]


@pytest.mark.parametrize("words, said", [(["--batch", "0"], "--batch"), (["--model", "R50x2"], "R50x1"),
                                         (["--repeats", "-1"], "--repeats"), (["--data", "absent.h5"], "absent.h5"),
                                         (["--precision", "tf32"], "tf32")])  # fmt: skip
def test_unusable_words(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        train_step.main([*SMALL, *words])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert said in message


@pytest.mark.gpu
def test_on_a_gpu(capsys, tmp_path):
    train_step.main(["--model", "R50x1", "--batch", "8", "--steps", "2", "--repeats", "2", "--warmup", "1",
                     "--json", str(tmp_path / "one.json")])  # fmt: skip
    result = json.loads((tmp_path / "one.json").read_text())
    assert result["peak_memory_gib"]["gpu"] > 0.1
    assert 0 < result["mfu_percent"] < 100
    assert sum(result["measured"]["share_percent"].values()) == pytest.approx(100)


def test_each_switch_of_the_step_can_be_turned(tmp_path, capsys):
    record, trace = tmp_path / "record.json", tmp_path / "trace.json"
    train_step.main([*SMALL, "--ablate", "--precision", "bf16", "--json", str(record), "--trace", str(trace)])
    found, said = json.loads(record.read_text()), capsys.readouterr().out
    assert set(found["images_per_second"]) == {"ours", *compared.ABLATIONS}
    for name, ratio in found["ours_over"].items():
        assert name in said
        assert ratio["low"] <= ratio["median"] <= ratio["high"]
        assert ratio["n"] == 3
        assert sum(found["breakdown_percent"][name].values()) == pytest.approx(100)
    assert found["breakdown_percent"]["ours"]["convolution"] > 0
    assert any("conv" in event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"])
    assert norm.fits.__name__ == "fits"  # as before
    assert torch.get_deterministic_debug_mode() == 0


def test_steps_of_others_train():
    """The compiled one is the eager one, and takes a minute to compile."""
    setup = Setup("R50x1", batch=2, precision="bf16", device="cpu", size=32, num_classes=5)
    batch = training.images(range(2), setup, torch.device("cpu"))
    models = []

    def note(model, *_):
        if isinstance(model, torch.nn.Module) and model not in models:
            models.append(model)

    found = steps.steps("R50x1", 5, "bf16", torch.channels_last, batch.images, batch.labels)
    assert set(found) == {steps.EAGER, steps.COMPILED, steps.BATCH_NORM}
    for name in (steps.EAGER, steps.BATCH_NORM):
        hook = torch.nn.modules.module.register_module_forward_hook(note)
        models.clear()
        found[name]()
        hook.remove()
        network = models[-1]  # the whole ends last
        before = [p.detach().clone() for p in network.parameters()]
        found[name]()
        assert all(p.grad.isfinite().all() for p in network.parameters())
        assert sum(not torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True)) > 100


def test_a_network_without_counterpart_is_said():
    with pytest.raises(UserError, match="--peers: .* counterpart of R8x0.25-8px"):
        compared.run(Setup("R8x0.25-8px", batch=1, precision="fp32", device="cpu", size=8), "peers", 1, 0)


def test_laps_of_a_gpu_are_seconds_as_those_of_the_host_are():
    """Of a GPU by events, which tell milliseconds."""
    watch = training.Stopwatch(torch.device("cpu"))
    assert watch._between(2.0, 2.25) == 0.25
    watch._gpu = True
    assert watch._between(SimpleNamespace(elapsed_time=lambda end: {"the end": 1500.0}[end]), "the end") == 1.5


def test_memory_is_told_in_gib(monkeypatch):
    monkeypatch.setattr(step.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5 * 2**19))  # KiB
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    assert step._peak_memory(torch.device("cpu")) == {"host": 2.5}
    assert step._peak_memory(torch.device("cuda")) == {"host": 2.5, "gpu": 3.0}
