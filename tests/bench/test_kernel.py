import json

import pytest
import torch

from bench import kernel
from bench.measured import adamw, norm, timing
from bench.measured import kernel as measured
from engine import compiled

SMALL = "R8x0.25-8px"


def test_the_record(tmp_path, capsys):
    kernel.main(["--model", SMALL, "--device", "cpu", "--repeats", "2", "--json", str(tmp_path / "result.json")])
    report = json.loads((tmp_path / "result.json").read_text())
    assert set(report["rates"]) == set(report["milliseconds"]) - {measured.COPY}
    assert report["milliseconds"][measured.PEER]["n"] == 2
    assert report["launches_per_step"] is None
    for name, rate in report["rates"].items():
        milliseconds = report["milliseconds"][name]["median"]
        assert rate["gb_per_s"] == pytest.approx(20 * report["parameters"] / milliseconds * 1e3 / 1e9)
        assert rate["of_bound"] == pytest.approx(report["bound_milliseconds"] / milliseconds)
    assert measured.PEER in capsys.readouterr().out


def test_separate_tensors_take_the_same_steps():
    """A step over tensors of their own leaves the parameters that a step over flat ones leaves."""
    found = []
    for separate in (False, True):
        subject = measured.Subject.build(SMALL, torch.device("cpu"), separate)
        subject.restore()
        buffers = {p.untyped_storage().data_ptr() for p in subject.params}
        assert len(buffers) == (len(subject.params) if separate else 1)
        measured.variants(subject)["AgcSgd foreach"]()
        found.append([p.detach().clone() for p in subject.params])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_bound_is_twenty_bytes_at_the_rate_of_a_copy_of_eight():
    times = {name: timing.summarize([value]) for name, value in ((measured.COPY, 2.0), ("x", 10.0))}
    assert measured.rates(times, 10**6)["x"] == pytest.approx({"gb_per_s": 2.0, "of_bound": 0.5, "times_bound": 2.0})


def test_the_peers_are_worth_comparing_with():
    """One step of each that clips leaves the same parameters, and so does one of each that does not."""
    pytest.importorskip("timm", reason="timm, a peer, is not installed")
    results = {}
    for index in range(len(measured.variants(measured.Subject.build(SMALL, torch.device("cpu"))))):
        subject = measured.Subject.build(SMALL, torch.device("cpu"))
        subject.gradients.mul_(1e5)  # so that the small learning rate moves something
        subject.restore()
        start = subject.flat.values.clone()
        name, step = list(measured.variants(subject).items())[index]
        step()
        results[name] = subject.flat.values - start
    del results[measured.COPY]
    results.pop("AgcSgd fused, standardizing", None)  # takes other gradients
    clipping = [name for name in results if "no clipping" not in name]
    assert len(clipping) == 4 + compiled.loaded()
    loop = results["eager loop with AGC"]
    for name, moved in results.items():
        expected = loop if name in clipping else results[measured.PEER]
        assert (moved - expected).norm() < 1e-2 * expected.norm(), name
    assert (results[measured.PEER] - loop).norm() > 0.1 * loop.norm()


@pytest.mark.parametrize("separate", [False, True])
def test_the_record_of_adamw(tmp_path, capsys, separate):
    words = ["--op", "agc_adamw", "--model", SMALL, "--device", "cpu", "--repeats", "2", "--json"]
    kernel.main([*words, str(tmp_path / "result.json"), *(["--separate"] if separate else [])])
    report = json.loads((tmp_path / "result.json").read_text())
    median = {name: times["median"] for name, times in report["milliseconds"].items()}
    assert report["ratios"] == pytest.approx(
        {name: value / median[adamw.PEER] for name, value in median.items() if name != measured.COPY}
    )
    for name, share in report["of_bound"].items():
        moved = report["bytes_per_parameter"][name]
        assert share == pytest.approx(moved / 8 * median[measured.COPY] / median[name])
        assert report["gb_per_s"][name] == pytest.approx(moved * report["parameters"] / median[name] / 1e6)
    assert report["bytes_per_parameter"][adamw.PEER] == 28
    assert adamw.PEER in capsys.readouterr().out


def test_the_peers_of_adamw_do_the_same():
    """Three steps of all that clip, and of all that do not; the first by itself goes equally far with any gradient."""
    pytest.importorskip("timm", reason="timm, a peer, is not installed")
    if not compiled.loaded():
        pytest.skip("the extension is not built")
    moved = {}
    for name in adamw.variants(measured.Subject.build(SMALL, torch.device("cpu"))):
        subject = measured.Subject.build(SMALL, torch.device("cpu"))
        start, (step, _) = subject.flat.values.clone(), adamw.variants(subject)[name]
        for seed, size in enumerate((1e-4, 10.0, 0.1)):
            subject.gradients.copy_(size * torch.randn(start.shape, generator=torch.Generator().manual_seed(seed)))
            subject.restore()
            step()
        moved[name] = subject.flat.values - start
    del moved[measured.COPY]
    for name, found in moved.items():
        expected = moved[adamw.PEER if "no clipping" in name else adamw.APART]
        assert (found - expected).norm() < 1e-2 * expected.norm(), name
    assert (moved[adamw.PEER] - moved[adamw.APART]).norm() > 0.1 * moved[adamw.APART].norm()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "R50x9"], "no network is called 'R50x9'"),
        (["--device", "cuda"], "no GPU is visible"),
        (["--op", "group_norm_relu", "--device", "cuda"], "no GPU is visible"),
        (["--compiled"], "--compiled is for --op group_norm_relu"),
        (["--op", "group_norm_relu", "--separate"], "--separate is for --op agc_sgd or agc_adamw"),
    ],
)
def test_bad_requests(words, message, capsys):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stop:
        kernel.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_group_norm_at_the_shapes_of_a_network():
    assert norm.shapes("R50x1", 224)[256, 56] == 3  # its first block: units 2 and 3, and what enters the second
    assert sum(norm.shapes("R50x1", 224).values()) == 3 * 16 + 1
    if not compiled.loaded():
        pytest.skip("engine._C is not built: python setup.py build_ext --inplace")
    report = norm.run(SMALL, 2, torch.device("cpu"), size=8, batch=2)
    assert {fact["shape"] for fact in report["shapes"]} == {f"{c}x{s}x{s}" for c, s in norm.shapes(SMALL, 8)}
    shapes = [tuple(map(int, fact["shape"].split("x")[:2])) for fact in report["shapes"]]
    assert shapes == sorted(shapes, key=lambda shape: (-shape[1], shape[0]))  # as they come in the network
    for fact in report["shapes"]:
        ours, theirs = (report["milliseconds"][f"{fact['shape']} {name}"]["median"] for name in (norm.OURS, norm.PEER))
        assert fact["speedup"] == pytest.approx(theirs / ours)
    assert "geometric mean" in norm.show(report)
