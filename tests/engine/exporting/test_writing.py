import json
import math
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

from engine.exporting import facts, onnx_file, program, timm_folder, writing
from engine.exporting.compared import Distance
from engine.network import family
from engine.network.bit import BitSpec
from engine.predicting import tuned
from loaders.errors import UserError
from loaders.pipelines import transform
from tests.support import tuned_run


@pytest.fixture(autouse=True)
def small_imagenet_root(monkeypatch):
    """The root of the published members, in small."""
    monkeypatch.setitem(family.MEMBERS, "R14x0.25", BitSpec((1, 1, 1, 1), 0.25, groups=8))


def prepared(folder, size):
    """The pictures of `tuned_run`, resized by Pillow: (12, 3, size, size) in 0..1, and not by the engine."""
    files = sorted((folder / "images").rglob("*.*"))
    images = [Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BILINEAR) for file in files]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255


def in_onnx(file, images):
    """As ONNX Runtime answers with all that it makes faster, which is its default."""
    session = onnxruntime.InferenceSession(file)
    return [torch.from_numpy(each) for each in session.run(None, {"images": images.numpy()})]


def in_torch(file, images):
    return torch.export.load(file).module()(images)


@pytest.mark.parametrize(
    ("network", "size", "several", "temperature"), [("R14x0.25", 41, False, None), ("R8x0.25-8px", 8, True, 2.5)]
)
def test_what_is_exported_answers_as_the_network_does(tmp_path, network, size, several, temperature):
    """For any number of images, which Pillow prepared as the file says; the calibration is inside."""
    preset, said = transform.bit_eval(size), []
    folder, model, _ = tuned_run.made(tmp_path / "run", network, preset, several=several, precision="bf16")
    if temperature:
        (folder / "temperature.json").write_text(json.dumps({"temperature": temperature}))
    record = writing.export(folder, tmp_path / "out", ["onnx", "torch"], say=said.append)
    assert said[0] == "trained in bf16, exported in float32"
    images = prepared(tmp_path, size)
    with torch.no_grad():
        logits = model.double()(tuned_run.normalized(images, preset).double()) / (temperature or 1.0)
    expected = logits.sigmoid() if several else logits.softmax(1)
    for answers, file in ((in_onnx, "model.onnx"), (in_torch, "model.pt2")):
        for part in (images, images[:1], images[3:8]):
            at = slice(3, 8) if len(part) == 5 else slice(len(part))
            probabilities, found = answers(tmp_path / "out" / file, part)
            torch.testing.assert_close(probabilities, expected[at].float(), rtol=0, atol=1e-5)
            torch.testing.assert_close(found, logits[at].float(), rtol=0, atol=1e-5 * float(logits.abs().max()))
    assert record["forms"]["onnx"]["probabilities_apart"] <= 1e-5
    assert record == json.loads((tmp_path / "out" / "export.json").read_text())
    files_say_what_they_are(tmp_path / "out", size)


def files_say_what_they_are(out, size):
    content = onnx.load(out / "model.onnx")
    assert [(each.domain, each.version) for each in content.opset_import] == [("", 21)]
    kinds = {node.op_type for node in content.graph.node}
    assert "GroupNormalization" in kinds and not {node.domain for node in content.graph.node} - {""}
    shapes = [[part.dim_param or part.dim_value for part in each.type.tensor_type.shape.dim] for each in
              (*content.graph.input, *content.graph.output)]  # fmt: skip
    assert shapes == [["batch", 3, size, size], ["batch", 3], ["batch", 3]]
    inside = {"facts.json": ""}
    torch.export.load(out / "model.pt2", extra_files=inside)
    kept = onnxruntime.InferenceSession(out / "model.onnx").get_modelmeta().custom_metadata_map
    assert kept == json.loads(inside["facts.json"])
    assert json.loads(kept["classes"]) == ["bird", "cat", "dog"] and "bf16" in kept["trained_in"]


@pytest.mark.parametrize("preset", [transform.bit_eval(40), transform.natural_eval(32)], ids=lambda each: each.kind)
def test_timm_makes_its_own_network_and_prepares_images_alike(tmp_path, preset):
    folder, model, _ = tuned_run.made(tmp_path / "run", "timm/resnet10t", preset, result=tuned_run.RESULT)
    (folder / "temperature.json").write_text('{"temperature": 0.5}')
    writing.export(folder, tmp_path / "out", ["timm"])
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out' / 'timm'}", pretrained=True).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    images = [Image.open(file).convert("RGB") for file in sorted((tmp_path / "images").rglob("*.*"))]
    given = torch.stack([prepare(image) for image in images])
    assert given.shape[2:] == (preset.size, preset.size)
    if preset.kind == "resize":
        ours = tuned_run.normalized(prepared(tmp_path, preset.size), preset)
        torch.testing.assert_close(given, ours, rtol=0, atol=0.02)
    with torch.no_grad():
        expected, found = 2 * model(given), theirs(given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert list(theirs.pretrained_cfg["label_names"]) == ["bird", "cat", "dog"]
    card = (tmp_path / "out" / "timm" / "README.md").read_text()
    assert card == (tmp_path / "out" / "README.md").read_text() and "local-dir" in card


def test_a_bit_is_the_same_function_in_timm(tmp_path):
    """Also one with kernels of little variance: timm adds 1e-8 to it where the published code adds 1e-10."""
    known = tuned.load(tuned_run.made(tmp_path / "run", "R50x1", transform.bit_eval(32))[0])
    for name, parameter in known.network.named_parameters():
        if name.endswith(("conv1.weight", "conv2.weight")):
            parameter.mul_(1e-3)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (tmp_path / "made").mkdir()
    calibrated = replace(facts.of(known), temperature=0.25)
    place = timm_folder.write(known, calibrated, tmp_path / "made")
    theirs = timm.create_model(f"local-dir:{place}", pretrained=True).eval().double()
    with torch.no_grad():
        found, expected = theirs(images), known.network.double()(images) / 0.25
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_without_a_choice_all_that_can_be_is_written_and_the_rest_is_named(tmp_path):
    folder, _, _ = tuned_run.made(tmp_path / "run")
    said = []
    record = writing.export(folder, tmp_path / "out", say=said.append)
    assert list(record["forms"]) == ["onnx", "torch"]
    assert any("left out, timm: timm has no network of the shape of R8x0.25-8px" in line for line in said)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.onnx",
        "model.pt2",
        "README.md",
        "export.json",
    }


def test_answers_that_differ_are_not_written(tmp_path, monkeypatch):
    folder, _, _ = tuned_run.made(tmp_path / "run")
    traced = program.traced

    def shifted(deployed, size):
        deployed.shift = deployed.shift + 1e-3
        found = traced(deployed, size)
        deployed.shift = deployed.shift - 1e-3
        return found

    monkeypatch.setattr(program, "traced", shifted)
    for form in ("onnx", "torch"):
        with pytest.raises(UserError, match=f"as {form} the network answers otherwise.*Leave that form out"):
            writing.export(folder, tmp_path / "out", [form])
        assert not list(tmp_path.glob("*out*"))


def test_a_network_that_is_sensitive_may_be_as_far_off_as_its_own_rounding(tmp_path, monkeypatch):
    """What is allowed otherwise is less than that here."""
    monkeypatch.setattr(writing, "ALLOWED", Distance(1e-10, 1e-10))
    folder, _, _ = tuned_run.made(tmp_path / "run")
    said = []
    (form,) = writing.export(folder, tmp_path / "out", ["torch"], say=said.append)["forms"].values()
    assert form["probabilities_apart"] <= 4 * form["rounding"][0] < 1e-5
    assert "its own rounding in float32 is" in said[-1]


def test_no_number_is_near_enough():
    one = Distance(1.0, 1.0)
    assert not Distance(math.nan, 0.0).within(one) and not Distance(0.0, math.nan).within(one, 4)
    assert one.within(one) and not Distance(1.0, 1.1).within(one) and Distance(4.0, 0.0).within(one, 4)


def test_what_cannot_be_compared_says_so(tmp_path, monkeypatch):
    folder, _, _ = tuned_run.made(tmp_path / "run")
    monkeypatch.setattr(onnx_file, "read", lambda file: None)
    said = []
    record = writing.export(folder, tmp_path / "out", ["onnx"], say=said.append)
    assert record["forms"]["onnx"]["images"] == 0
    assert "model.onnx: not compared: what runs it is not installed" in said
    assert "not compared" in (tmp_path / "out" / "README.md").read_text()


def find_nothing(*absent):
    from importlib.util import find_spec

    return lambda name: None if name in absent else find_spec(name)


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    folder, _, _ = tuned_run.made(tmp_path / "run")
    monkeypatch.setattr(onnx_file.importlib.util, "find_spec", find_nothing("onnx", "onnxscript"))
    with pytest.raises(UserError, match="--onnx: ONNX needs onnx and onnxscript: pip install onnx onnxscript"):
        writing.export(folder, tmp_path / "out", ["onnx"])
    assert list(writing.export(folder, tmp_path / "out")["forms"]) == ["torch"]


def test_onnx_runtime_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file.importlib.util, "find_spec", find_nothing("onnxruntime"))
    assert onnx_file.missing() is None and onnx_file.read(tmp_path) is None


@pytest.mark.parametrize(
    ("out", "forms", "images", "said"),
    [("file", ["torch"], None, "is a file"), ("used", ["torch"], None, "holds notes.txt, which is no export"),
     ("done", ["torch"], None, "add --force"), ("new", ["timm"], None, "--timm: timm has no network of the shape"),
     ("new", ["torch"], "none.h5", "there is no pack"), ("", ["torch"], None, "no folder is named")],
)  # fmt: skip
def test_places_and_forms_that_cannot_be(tmp_path, out, forms, images, said):
    folder, _, _ = tuned_run.made(tmp_path / "run")
    (tmp_path / "file").write_text("")
    for name, inside in (("used", "notes.txt"), ("done", "export.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / inside).write_text("{}")
    with pytest.raises(UserError, match=said):
        writing.export(folder, tmp_path / out if out else "", forms, images=images)
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "new").exists()


def test_a_run_whose_images_are_gone_wants_others(tmp_path):
    folder, _, _ = tuned_run.made(tmp_path / "run")
    moved = (tmp_path / "images.h5").rename(tmp_path / "moved.h5")
    with pytest.raises(UserError, match="not there to compare with.*name a pack with --images"):
        writing.export(folder, tmp_path / "out", ["torch"])
    assert writing.export(folder, tmp_path / "out", ["torch"], images=str(moved))["forms"]["torch"]["images"] == 12


def test_an_export_is_replaced_whole(tmp_path):
    folder, _, _ = tuned_run.made(tmp_path / "run")
    writing.export(folder, tmp_path / "out", ["onnx"])
    writing.export(folder, tmp_path / "out", ["torch"], force=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.pt2", "README.md", "export.json"}
    assert not list(tmp_path.glob(".*"))
