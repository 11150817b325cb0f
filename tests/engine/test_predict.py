import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from engine import finetune, predict
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.config.loading import load
from engine.config.schema import FinetuneConfig
from engine.predicting import table, tuned
from engine.saving import checkpoint
from engine.training.evaluate import per_class_auc
from loaders.packs.shard import Pack
from loaders.packs.writer import Record, ShardWriter, new_attributes
from tests.conftest import ROOT
from tests.support.pictures import encoded, folder, photo


def tune(place, *words):
    """A fine-tuning run in a folder; its result line."""
    words = ["from=random", f"folder={place}", f"results={place}.jsonl", *words]
    config = load(FinetuneConfig, "demo", words, "finetune")
    return finetune.finetune(config, Communicator(Launch("alone")), quiet=True)


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """Two runs of the same classes, and their result lines."""
    place = tmp_path_factory.mktemp("runs")
    packs = [f"data.train={digits / 'high-train.h5'}", f"data.test={digits / 'high-test.h5'}", "model=R8x0.25-8px"]
    lines = [tune(place / name, *packs, "rule.steps=20", f"seed={seed}") for seed, name in enumerate(("a", "b"))]
    return [place / "a", place / "b"], lines


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """A run of one of timm's networks on pictures of 40 x 60 pixels, and their folder."""
    place = tmp_path_factory.mktemp("pets")
    folder(place / "images", per_class=6)
    words = [sys.executable, "-m", "loaders.pack", place / "images", place / "pets.h5", "--workers", "0"]
    subprocess.run(words, check=True, cwd=ROOT, capture_output=True)
    packs = [f"data.train={place / 'pets.h5'}", f"data.test={place / 'pets.h5'}", "data.overlap=allow"]
    tune(place / "run", *packs, "model=timm/test_resnet", "data.size=32", "data.resize=36", "rule.steps=10",
         "lr=0.3", "batch=16", "data.normalize=imagenet")  # fmt: skip
    return place / "run", place / "images"


def predicted(*words, code=0):
    with pytest.raises(SystemExit) as ended:
        predict.main([str(word) for word in words])
    assert ended.value.code == code


def test_predictions_have_the_score_that_fine_tuning_gave(digits, runs, tmp_path, capsys):
    (first, _), (line, _) = runs
    predicted(first, digits / "high-test.h5", "--out", tmp_path / "p.csv", "--batch", "50")
    assert "269 images, " in (said := capsys.readouterr().out) and f"→ {tmp_path / 'p.csv'}" in said
    found, pack = table.read(tmp_path / "p.csv"), Pack.open(digits / "high-test.h5")
    assert found.keys == list(pack.keys) and found.names == tuple("56789")
    np.testing.assert_array_equal(found.labels, pack.labels)
    hits = found.probabilities.argmax(1) == found.labels
    assert 100 * hits.mean() == pytest.approx(line["metric_value"])
    right = found.probabilities[np.arange(len(hits)), found.labels]
    assert -np.log(right).mean() == pytest.approx(line["test_loss"], rel=1e-5)


def test_what_is_said_beside_names_network_transform_and_data(digits, runs, tmp_path):
    (first, _), _ = runs
    predicted(first, digits / "high-test.h5", "--out", tmp_path / "p.csv")
    about, place = table.about_of(tmp_path / "p.csv"), checkpoint.find(first)
    assert (about["kind"], about["several_labels"], about["names"]) == ("predictions", False, list("56789"))
    (run,) = about["runs"]
    digest = subprocess.run(["sha256sum", place / "weights.safetensors"], capture_output=True, text=True, check=True)
    assert (run["path"], run["checkpoint"], run["checksum"]) == (str(first), str(place), digest.stdout.split()[0])
    assert about["transform"] == {"kind": "resize", "size": 8, "resize": None, "mean": [0.5] * 3, "std": [0.5] * 3,
                                  "downscale": "linear"}  # fmt: skip
    assert about["data"]["images"] == about["images"] == 269 and about["unreadable"] == []


def test_several_networks_are_the_mean_of_their_probabilities(digits, runs, tmp_path):
    places, _ = runs
    each = []
    for number, run in enumerate([*places, None]):
        chosen = places if run is None else [run]
        predicted(*chosen, digits / "high-test.h5", "--out", tmp_path / f"{number}.csv")
        each.append(table.read(tmp_path / f"{number}.csv").probabilities)
    np.testing.assert_allclose(each[2], (each[0] + each[1]) / 2, rtol=1e-12)
    assert np.abs(each[0] - each[1]).max() > 0.05


@pytest.mark.parametrize("backend", ["host", "dali"])
def test_each_image_gives_what_timm_and_pillow_make_of_it(pets, tmp_path, backend):
    run, images = pets
    predicted(run, images, "--out", tmp_path / "p.csv", "--batch", "4", "--backend", backend)
    found = table.read(tmp_path / "p.csv")
    assert len(found) == 18 and [found.names[n] for n in found.labels] == [key.split("/")[0] for key in found.keys]
    network = timm.create_model("test_resnet", num_classes=3).eval()
    network.load_state_dict(load_file(checkpoint.find(run) / checkpoint.WEIGHTS))
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    expected = []
    for key in found.keys:
        image = Image.open(images / key).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
        with torch.no_grad():
            expected.append(network(((pixels - mean) / std)[None]).softmax(1)[0].numpy())
    differ = np.ptp(np.array(expected), axis=0).max()  # from image to image
    np.testing.assert_allclose(found.probabilities, expected, atol=0.1 * differ)
    assert differ > 0.05
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_sources_of_any_kind_give_the_same(pets, tmp_path, capsys):
    """A folder of classes; one without; files by a pattern; a list; a table with a label that is not known."""
    run, images = pets
    (tmp_path / "flat").mkdir()
    keys = ["cat/0.jpg", "cat/1.png", "dog/2.jpg"]
    for key in keys:
        shutil.copy(images / key, tmp_path / "flat" / key.replace("/", "-"))
    flat = [f"flat/{key.replace('/', '-')}" for key in keys]
    (tmp_path / "list.txt").write_text("\n".join(flat))
    rows = [f"{flat[0]},cat,p1", f"{flat[1]},,p1", f"{flat[2]},lion,"]
    (tmp_path / "t.csv").write_text("path,label,patient\n" + "\n".join(rows))
    (tmp_path / "plain.csv").write_text("file\n" + "\n".join(flat))
    predicted(run, images, "--out", tmp_path / "all.csv")
    whole = table.read(tmp_path / "all.csv")
    expected = whole.probabilities[[whole.keys.index(key) for key in keys]]
    capsys.readouterr()
    said = {}
    for name in ("flat", "flat/*", "list.txt", "t.csv", "plain.csv"):
        predicted(run, tmp_path / name, "--out", tmp_path / "p.csv")
        found = table.read(tmp_path / "p.csv")
        np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)
        assert [key.replace("-", "/").removeprefix("flat/") for key in found.keys] == keys
        assert (found.labels is None) == (name != "t.csv")
        said[name] = capsys.readouterr().out
        if name == "t.csv":
            assert found.labels.tolist() == [1, -1, -1] and found.groups == ["0", "0", ""]
    assert "without labels: " in said["flat"] and "in no class folder" in said["flat"]
    assert "without labels: " in said["plain.csv"] and "no column for the label" in said["plain.csv"]
    assert "images have no such label: lion" in said["t.csv"]
    predicted(run, tmp_path / "flat" / "cat-0.jpg", "--out", tmp_path / "one.parquet")
    one = table.read(tmp_path / "one.parquet")
    assert one.keys == ["cat-0.jpg"]
    np.testing.assert_allclose(one.probabilities, expected[:1], atol=1e-6)


def test_classes_of_others_are_no_labels(pets, digits, tmp_path, capsys):
    run, _ = pets
    predicted(run, digits / "low-test.h5", "--out", tmp_path / "p.csv")
    assert table.read(tmp_path / "p.csv").labels is None
    assert "without labels: it has 0, 1, 2, 3, 4, and the network is for bird, cat, dog" in capsys.readouterr().out


def test_images_that_cannot_be_read_are_left_out_and_listed(pets, tmp_path, capsys):
    run, images = pets
    predicted(run, images, "--out", tmp_path / "before.csv")
    before = table.read(tmp_path / "before.csv")
    shutil.copytree(images, tmp_path / "some")
    (tmp_path / "some" / "cat" / "0.jpg").write_bytes(b"\xff\xd8\xff no picture")
    capsys.readouterr()
    predicted(run, tmp_path / "some", "--out", tmp_path / "p.csv")
    said, found = capsys.readouterr(), table.read(tmp_path / "p.csv")
    assert "17 images, 1 unreadable left out" in said.out and "unreadable: cat/0.jpg: " in said.err
    kept = [i for i, key in enumerate(before.keys) if key != "cat/0.jpg"]
    assert found.keys == [before.keys[i] for i in kept]
    np.testing.assert_allclose(found.probabilities, before.probabilities[kept], atol=1e-6)
    assert [key for key, _ in table.about_of(tmp_path / "p.csv")["unreadable"]] == ["cat/0.jpg"]


def test_records_of_a_pack_that_are_damaged_are_left_out_and_listed(digits, runs, tmp_path, capsys):
    (first, _), _ = runs
    shutil.copy(digits / "high-test.h5", tmp_path / "p.h5")
    pack = Pack.open(tmp_path / "p.h5")
    at = pack._shards[0].blob_span[0] + int(pack._shards[0].offsets[7])
    key = pack.keys[7]
    with open(tmp_path / "p.h5", "r+b") as file:
        file.seek(at + 30)
        file.write(b"\0\1\2\3")
    predicted(first, tmp_path / "p.h5", "--out", tmp_path / "p.csv")
    assert f"unreadable: {key}: its bytes do not match their checksum" in capsys.readouterr().err
    found = table.read(tmp_path / "p.csv")
    assert found.keys == [other for other in pack.keys if other != key]
    np.testing.assert_array_equal(found.labels, np.delete(pack.labels, 7))


def vectors(path, rows, names=("bright", "always")):
    """A pack of label vectors: `rows` of brightness, label."""
    (attributes,) = new_attributes({"source": "made up", "kind": "test"}, 1)
    rng = np.random.RandomState(len(rows))
    with ShardWriter(path, names, attributes) as writer:
        for number, (bright, *label) in enumerate(rows):
            pixels = (rng.rand(8, 8) * 100 + 150 * bright).clip(0, 255).astype(np.uint8)
            writer.add(Record(encoded(Image.fromarray(pixels), "PNG"), f"{number:03d}", label, 8, 8, number // 3))
        writer.finish()
        writer.publish()
    return path


def test_several_labels_at_once(tmp_path, capsys):
    """Sigmoids, unknown labels, a label of the pack that the network does not know, and one that it alone knows."""
    nan = float("nan")
    train = vectors(
        tmp_path / "train.h5", [(i % 2, float(i % 2), nan if i % 3 else float(i % 4 > 1)) for i in range(60)]
    )
    line = tune(tmp_path / "run", f"data.train={train}", f"data.test={train}", "data.overlap=allow", "rule.steps=30",
                "model=R8x0.25-8px", "lr=0.1")  # fmt: skip
    predicted(tmp_path / "run", train, "--out", tmp_path / "p.csv")
    found, pack = table.read(tmp_path / "p.csv"), Pack.open(train)
    assert found.many and found.names == ("bright", "always")
    np.testing.assert_array_equal(found.labels, pack.labels)
    assert found.groups == [str(number // 3) for number in range(60)]
    areas = per_class_auc(found.labels, found.probabilities)
    assert 100 * np.mean(areas) == pytest.approx(line["metric_value"])
    assert not np.allclose(found.probabilities.sum(1), 1, atol=0.01)
    other = vectors(tmp_path / "other.h5", [(i % 2, 1.0, float(i % 2)) for i in range(9)], ("strange", "bright"))
    predicted(tmp_path / "run", other, "--out", tmp_path / "o.csv")
    found = table.read(tmp_path / "o.csv")
    np.testing.assert_array_equal(found.labels, [[i % 2, nan] for i in range(9)])
    assert "no such label: strange" in capsys.readouterr().out


def test_any_number_of_ranks_writes_the_same(digits, runs, tmp_path, launch):
    (first, second), _ = runs
    predicted(first, second, digits / "high-test.h5", "--out", tmp_path / "1.csv", "--batch", "64")
    words = [
        "-m",
        "engine.predict",
        first,
        second,
        digits / "high-test.h5",
        "--out",
        tmp_path / "3.csv",
        "--batch",
        "7",
    ]
    done = launch(3, "torchrun", words)
    assert done.returncode == 0, done.stderr
    one, three = table.read(tmp_path / "1.csv"), table.read(tmp_path / "3.csv")
    assert one.keys == three.keys
    np.testing.assert_allclose(three.probabilities, one.probabilities, atol=1e-6)
    np.testing.assert_array_equal(three.labels, one.labels)


def test_fewer_images_than_ranks(pets, tmp_path, launch):
    run, images = pets
    (tmp_path / "few").mkdir()
    shutil.copy(images / "cat" / "0.jpg", tmp_path / "few")
    done = launch(2, "torchrun", ["-m", "engine.predict", run, tmp_path / "few", "--out", tmp_path / "p.csv"])
    assert done.returncode == 0, done.stderr
    assert table.read(tmp_path / "p.csv").keys == ["0.jpg"]
    assert {path.name for path in tmp_path.iterdir()} == {"few", "p.csv", "p.csv.about.json"}


BAD = {
    "no run": (lambda at, runs, pets: [at / "none", at / "x.png"], "does not exist"),
    "no source": (lambda at, runs, pets: [runs[0], at / "none.h5"], "nothing at"),
    "an empty folder": (lambda at, runs, pets: [runs[0], at], "holds no images"),
    "other classes": (lambda at, runs, pets: [runs[0], pets, at / "x.png"], "for other classes than"),
    "the same twice": (lambda at, runs, pets: [runs[0], runs[0], at / "x.png"], "count twice"),
    "a folder to write": (lambda at, runs, pets: [runs[0], at / "x.png", "--out", at], "is a folder"),
    "itself to write": (lambda at, runs, pets: [runs[0], at / "t.csv", "--out", at / "t.csv"], "would replace"),
    "a setting that is none": (lambda at, runs, pets: [runs[0], at / "x.png", "--set", "a"], "expected KEY=VALUE"),
    "a setting of others": (lambda at, runs, pets: [runs[0], at / "x.png", "--set", "a=b"], "have no settings"),
    "none that decodes": (lambda at, runs, pets: [runs[0], at / "bad.png"], "none of the 1 images"),
    "a label that is none": (lambda at, runs, pets: [runs[0], at / "t.csv", "--set", "labels=a,b"], "no column 'a'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_ends_in_one_message_and_leaves_nothing(runs, pets, tmp_path, monkeypatch, capsys, what):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    at = tmp_path if what == "an empty folder" else tmp_path / "in"
    if what != "an empty folder":
        (at / "x.png").write_bytes(encoded(photo(0, 8, 8), "PNG"))
        (at / "bad.png").write_bytes(b"none")
        (at / "t.csv").write_text("path,label\nx.png,5\n")
    words, said = BAD[what][0](at, runs[0], pets[0]), BAD[what][1]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    predicted(*words, code=2)
    message = capsys.readouterr().err
    assert message.startswith("error: ") and said in message and "Traceback" not in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_network_that_gives_no_numbers_is_refused(runs, digits, tmp_path, monkeypatch, capsys):
    whole = tuned.load

    def broken(*words):
        found = whole(*words)
        torch.nn.init.constant_(found.network.head.conv.bias, torch.nan)
        return found

    monkeypatch.setattr(tuned, "load", broken)
    predicted(runs[0][0], digits / "high-test.h5", "--out", tmp_path / "p.csv", code=2)
    assert "is no number" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_signal_leaves_no_temporary_files(pets, tmp_path):
    run, images = pets
    code = (
        "import os, signal, sys; from engine import predict; from engine.predicting import run\n"
        "run._batches = lambda *words: os.kill(os.getpid(), signal.SIGTERM)\n"
        "predict.main(sys.argv[1:])"
    )
    words = [sys.executable, "-c", code, run, images, "--out", tmp_path / "p.csv"]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, list(tmp_path.iterdir())) == (130, [])
    assert done.stderr.startswith("interrupted; ") and "Traceback" not in done.stderr


def test_without_a_name_it_is_called_by_its_source(digits, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predicted(runs[0][0], digits / "high-test.h5")
    assert json.loads((tmp_path / "high-test-predictions.csv.about.json").read_text())["images"] == 269
    assert [str(predict.beside(name)) for name in ("a/b/", "x/*.png", "scans/ct*/", "xray:nih:/data/nih", "*")] == [
        "b-predictions.csv", "images-predictions.csv", "ct-predictions.csv", "nih-predictions.csv",
        "images-predictions.csv",
    ]  # fmt: skip
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
