import json

import pytest
import torch

from bench import kernel
from bench.measured import kernel as measured
from bench.measured import timing
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


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--model", "R50x9"], "no network is called 'R50x9'"), (["--device", "cuda"], "no GPU is visible")],
)
def test_bad_requests(words, message, capsys):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stop:
        kernel.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
