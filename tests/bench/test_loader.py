import json

import pytest

from bench import loader
from bench.measured import pack_index
from bench.peers import loaders, turns
from bench.peers import xray as loader_xray
from loaders.packs.shard import Pack
from loaders.pipelines.transform import natural_train
from tests.support.pictures import folder


def test_rates_ratios_and_latencies():
    done = {
        turns.OURS: turns.Turns([100.0, 120.0, 90.0], [10.0] * 9, [0.0], [1.0]),
        "other": turns.Turns([50.0, 40.0, 90.0], list(range(1, 101)), [0.0, 3.0], [1.0, 2.0]),
    }
    compared = turns.ratios(done, turns.OURS)
    assert compared == {"other": {"median": 2.0, "low": 1.0, "high": 3.0, "n": 3}}
    rates = turns.report(done, threads=2)
    assert rates["other"]["images_per_second"] == 50
    assert rates["other"]["per_core"] == 25
    assert rates["other"]["latency_ms"]["p90"] == pytest.approx(90.1)


def test_a_small_run_leaves_a_complete_record(tmp_path, capsys):
    folder(tmp_path / "images", height=60, width=60)
    out, plot = tmp_path / "r" / "loader.json", tmp_path / "loader.png"
    words = ["--only", "host pipeline", "--turns", "2", "--batches", "2", "--batch", "4", "--threads", "1"]
    assert loader.main([str(tmp_path / "images"), *words, "--out", str(out), "--plot", str(plot)]) == 0
    assert "pack, host pipeline" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["loaders"]["pack, host pipeline"]["images_per_second"] > 0
    assert {"command", "commit", "hardware", "versions", "batch", "threads"} <= result.keys()
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_x_rays_beside_torchxrayvision(tmp_path, capsys):
    folder(tmp_path / "images", height=60, width=60, mode="L")
    out = tmp_path / "xray.json"
    words = ["--xray", "--turns", "1", "--batches", "1", "--batch", "4", "--threads", "1", "--only", "host,torchxray"]
    assert loader.main([str(tmp_path / "images"), *words, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["what"].startswith("X-ray transform to 224")
    assert set(result["loaders"]) == {turns.HOST, loader_xray.NAME}


def test_every_loader_brings_its_images_to_the_device(tmp_path, monkeypatch):
    """Ours as bytes; the others' floats are taken there by the bench. `meta` stands for a GPU."""
    folder(tmp_path / "images", height=60, width=60)
    how = {"batch": 4, "threads": 1, "transform": natural_train(loaders.SIZE), "device": "meta"}
    material = loaders.prepare(str(tmp_path / "images"), tmp_path, None, 95, **how)
    names = {name: loaders.loaders()[name] for name in (turns.HOST, "torchvision DataLoader")}
    seen, timed = [], turns._time

    def looked_at(stream, *numbers):
        seen.append(next(stream).device.type)
        return timed(stream, *numbers)

    monkeypatch.setattr(turns, "_time", looked_at)
    done = turns.measure(material, names, 1, 1, 1, cold=False)
    assert seen == ["meta"] * 2
    assert all(len(one.rates) == 1 for one in done.values())


def test_what_cannot_be_measured(tmp_path, capsys, monkeypatch):
    assert loader.main([str(tmp_path / "absent"), "--only", "host"]) == 2
    assert loader.main([str(tmp_path), "--only", "nobody"]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for words in (["--device", "cuda"], ["--decode", "gpu"], ["--decode", "mixed"]):
        assert loader.main([str(tmp_path), *words, "--only", "host"]) == 2
        assert "GPU" in capsys.readouterr().err
    for word in ("--batch", "--threads", "--turns", "--batches"):
        assert loader.main([str(tmp_path), word, "0"]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_a_small_index(tmp_path):
    pack_index.write(tmp_path / "p.h5", 3000, 2, 16)
    found = pack_index.open_and_read(tmp_path / "p.h5", cold=True)
    assert found["open_s"] > 0
    assert len(Pack.open(tmp_path / "p.h5")) == 3000
    assert pack_index.table_memory(1000) >= 0
