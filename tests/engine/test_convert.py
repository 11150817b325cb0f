"""Conversion of weights: every file is written and read here without our own code, and outputs are timm's."""

import itertools
import json
import os
import re
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import finetune, weights
from engine.network import bit, conversion, formats
from engine.network.weights import apply, load
from engine.saving import checkpoint
from loaders.errors import UserError
from tests.conftest import ROOT
from tests.support.weight_files import CLASSES, NAME, equal, official_arrays, randomized, timm_state

KINDS = {
    "safetensors": "w.safetensors",
    "pth": "w.pth.tar",
    "npz": "w.npz",
    "timm": "t.safetensors",
    "timm-pth": "t.pth",
}
HEADS = "head.conv.", "resnet/head/", "head.fc."


def contents(kind, model, head=True):
    """What a file of a kind holds of a network: name → tensor or array."""
    made = {"npz": official_arrays, "timm": timm_state, "timm-pth": timm_state}.get(kind, torch.nn.Module.state_dict)
    return {name: value for name, value in made(model).items() if head or not name.startswith(HEADS)}


def write(kind, path, content):
    if path.suffix == ".npz":
        np.savez(path, **content)
    elif path.suffix == ".safetensors":
        save_file(content, path)
    else:
        legacy = kind == "legacy"
        content = content if kind == "timm-pth" else {"model": content, "epoch": 89}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def read(kind, path):
    if kind == "npz":
        with np.load(path) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, weights_only=True)
    return content if kind == "timm-pth" else content["model"]


def same(found, expected):
    return equal(found, {name: torch.as_tensor(value) for name, value in expected.items()})


def convert(source, target, kind, **options):
    return weights.convert(source, target, "timm" if kind.startswith("timm") else None, **options)


@pytest.mark.parametrize("head", [True, False], ids=["head", "headless"])
@pytest.mark.parametrize("name", [NAME, "R20x0.5-32px"])
def test_every_pair_of_formats(tmp_path, name, head):
    model = randomized(name)
    for source, target in itertools.product([*KINDS, "legacy"], KINDS):
        folder = tmp_path / f"{source}-{target}"
        folder.mkdir()
        path = folder / f"source-{KINDS.get(source, 'w.pth')}"
        write(source, path, contents(source, model, head))
        written = convert(path, folder / KINDS[target], target)
        assert same(read(target, folder / KINDS[target]), contents(target, model, head)), (source, target)
        assert written.network == name
        assert written.classes == (CLASSES if head else None)
        assert written.size == os.stat(folder / KINDS[target]).st_size
        assert len(list(folder.iterdir())) == 2


def test_the_published_layout(tmp_path):
    """The names that the published code's modules give: root, body of blocks of units, head."""
    write("npz", tmp_path / "w.npz", official_arrays(randomized("R20x0.25-32px")))
    weights.convert(tmp_path / "w.npz", tmp_path / "model.pth.tar")
    content = torch.load(tmp_path / "model.pth.tar", weights_only=True)
    layers = [name.format(i) for i in (1, 2, 3) for name in ("gn{}.weight", "gn{}.bias", "conv{}.weight")]
    units = [f"body.block{i}.unit{j:02d}.{layer}" for i in (1, 2, 3) for j in (1, 2) for layer in layers]
    shortcuts = [f"body.block{i}.unit01.downsample.weight" for i in (1, 2, 3)]
    head = ["head.gn.weight", "head.gn.bias", "head.conv.weight", "head.conv.bias"]
    assert list(content) == ["model"]
    assert set(content["model"]) == {"root.conv.weight", *units, *shortcuts, *head}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_are_kept_but_npz_has_float32(tmp_path, kind, dtype):
    model = randomized().to(dtype)
    save_file(model.state_dict(), tmp_path / "source")
    convert(tmp_path / "source", tmp_path / KINDS[kind], kind)
    expected = contents(kind, model.float() if kind == "npz" else model)
    found = read(kind, tmp_path / KINDS[kind])
    assert same(found, expected)
    assert {value.dtype for value in found.values()} == {torch.float32 if kind == "npz" else dtype}


@pytest.mark.parametrize("kind", KINDS)
def test_views_of_a_larger_buffer_are_written_alone(tmp_path, kind):
    """A state saved from flat buffers shares one storage, which neither blows up the file nor refuses it."""
    state = randomized().state_dict()
    flat = torch.cat([torch.zeros(500_000), *(value.flatten() for value in state.values())])
    parts = flat[500_000:].split([value.numel() for value in state.values()])
    views = {name: part.view(state[name].shape) for name, part in zip(state, parts, strict=True)}
    torch.save(views, tmp_path / "views.pth")
    written = convert(tmp_path / "views.pth", tmp_path / KINDS[kind], kind)
    assert equal(load(tmp_path / KINDS[kind]), state)
    assert written.size < 4 * flat.numel() - 1_000_000


# --- timm ---


def timm_model(name, classes):
    timm = pytest.importorskip("timm", reason="timm, the reference, is not installed")
    torch.manual_seed(3)
    return timm.create_model(name, num_classes=classes).eval()


def perturb(model):
    """Norms that do something, and a classifier; all from a seed."""
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def published_epsilon(model):
    """timm adds 1e-8 to a kernel's variance, the published code 1e-10: for small kernels, not the same function."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and hasattr(module, "eps"):
            module.eps = 1e-10


def agree(ours, theirs):
    """Outputs in float64 within 1e-5 of the largest."""
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found, expected = ours.double().eval()(images), theirs.double().eval()(images)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("name", "kind"), [("R50x1", "timm"), ("R101x1", "timm-pth")])
def test_timm_computes_the_same_with_our_weights(tmp_path, name, kind):
    ours = randomized(name, 9)
    save_file(ours.state_dict(), tmp_path / "ours.safetensors")
    convert(tmp_path / "ours.safetensors", tmp_path / KINDS[kind], kind)
    theirs = timm_model(f"resnetv2_{name[1:].lower()}_bit", 9)
    theirs.load_state_dict(read(kind, tmp_path / KINDS[kind]), strict=True)
    agree(ours, theirs)


def test_timm_computes_the_same_features_without_a_classifier(tmp_path):
    ours = randomized("R50x1", 9)
    write("pth", tmp_path / "ours.pth", contents("pth", ours, head=False))
    weights.convert(tmp_path / "ours.pth", tmp_path / "timm.safetensors", "timm")
    theirs = timm_model("resnetv2_50x1_bit", 0)
    theirs.load_state_dict(load_file(tmp_path / "timm.safetensors"), strict=True)
    ours.head.conv = torch.nn.Identity()
    agree(ours, theirs)


def test_we_compute_the_same_with_timms_weights(tmp_path):
    theirs = perturb(timm_model("resnetv2_50x1_bit", 9))
    published_epsilon(theirs)
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    ours = bit.build("R50x1", 9)
    apply(ours, load(tmp_path / "timm.safetensors"), new_head=False)
    agree(ours, theirs)


def test_timm_reads_our_npz(tmp_path):
    ours = perturb(bit.build("R50x1", 9, zero_head=False))
    save_file(ours.state_dict(), tmp_path / "ours.safetensors")
    weights.convert(tmp_path / "ours.safetensors", tmp_path / "BiT.npz")
    theirs = timm_model("resnetv2_50x1_bit", 9)
    theirs.load_pretrained(str(tmp_path / "BiT.npz"))
    published_epsilon(theirs)
    agree(ours, theirs)


def test_fine_tuning_starts_from_timms_file(digits, tmp_path):
    state = randomized("R8x0.25-8px", 5).state_dict()
    save_file(state, tmp_path / "ours.safetensors")
    weights.convert(tmp_path / "ours.safetensors", tmp_path / "timm.safetensors", "timm")
    packs = [f"data.train={digits / 'high-train.h5'}", f"data.test={digits / 'high-test.h5'}"]
    sources = f"from={tmp_path / 'ours.safetensors'},{tmp_path / 'timm.safetensors'}"
    with pytest.raises(SystemExit) as ended:
        finetune.main(["demo", *packs, sources, f"results={tmp_path / 'r.jsonl'}", "shots=5", "rule.steps=5"])
    ours, timms = (json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines())
    assert ended.value.code == 0
    assert ours["network"] == timms["network"] == "R8x0.25-8px"
    assert ours["test_loss"] == timms["test_loss"]


# --- the command line ---


def command(capsys, *words):
    """Exit code, stdout, stderr."""
    code = 0
    try:
        weights.main(["convert", *map(str, words)])
    except SystemExit as ended:
        code = ended.code
    return (code, *capsys.readouterr())


@pytest.fixture
def source(tmp_path):
    save_file(randomized().state_dict(), tmp_path / "ours.safetensors")
    return tmp_path / "ours.safetensors"


def test_it_says_what_it_wrote(tmp_path, source, capsys):
    code, out, _ = command(capsys, source, tmp_path / "w.npz")
    parameters = sum(value.numel() for value in load_file(source).values())
    megabytes = os.stat(tmp_path / "w.npz").st_size / 1e6
    assert code == 0
    for fact in (NAME, f"{parameters:,} parameters", "6 classes", "official .npz", "float32", f"{megabytes:.1f} MB"):
        assert fact in out


def test_the_module_runs_and_teaches():
    done = subprocess.run([sys.executable, "-m", "engine.weights", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "python -m engine.weights convert model.pth.tar model.safetensors" in done.stdout


def test_runs_and_checkpoints(tmp_path, capsys):
    first, last = randomized(), randomized(classes=4)
    for step, model in ((10, first), (20, last)):
        checkpoint.save(tmp_path / "run" / "checkpoints", model.state_dict(), {"step": step}, {"network": NAME}, keep=2)
    for folder, model in (("run", last), ("run/checkpoints/step-00000010", first)):
        assert command(capsys, tmp_path / folder, tmp_path / "w.pth", "--force")[0] == 0
        assert same(read("pth", tmp_path / "w.pth"), model.state_dict())


def test_others_may_read_the_file_as_the_umask_says(tmp_path, source):
    (tmp_path / "reference").touch()
    for kind, name in KINDS.items():
        convert(source, tmp_path / name, kind)
        assert (tmp_path / name).stat().st_mode == (tmp_path / "reference").stat().st_mode, kind


def test_the_format_may_be_said_where_the_ending_does_not(tmp_path, source):
    weights.convert(source, tmp_path / "weights", "npz")
    assert same(read("npz", tmp_path / "weights"), official_arrays(randomized()))
    weights.convert(source, tmp_path / "W.PTH.TAR")
    assert same(read("pth", tmp_path / "W.PTH.TAR"), randomized().state_dict())


class Evil:
    def __reduce__(self):
        return os.mkdir, ("trap",)


def unusable(tmp_path):
    """Case → words, and what the message says."""
    ours, state = tmp_path / "ours.safetensors", randomized().state_dict()
    damaged = tmp_path / "damaged.npz"
    np.savez(damaged, **official_arrays(randomized()))
    damaged.write_bytes(damaged.read_bytes()[:-9000])
    torch.save({"model": state, "args": Evil()}, tmp_path / "evil.pth")
    torch.save({"layer1.0.conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    torch.save({name: state[name] for name in state if "unit01.gn2" not in name}, tmp_path / "part.pth")
    torch.save({**state, "head.conv.weight": torch.tensor(1.0)}, tmp_path / "scalar.pth")
    torch.save({name: state[name] for name in state if name != "head.conv.bias"}, tmp_path / "unbiased.pth")
    torch.save({**state, "ema.weight": torch.zeros(3)}, tmp_path / "more.pth")
    torch.save({**state, "head.gn.bias": torch.full([256], torch.nan)}, tmp_path / "nan.pth")
    save_file({"root.conv.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "root.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.npz").write_text("mine")
    new = tmp_path / "new.npz"
    return {
        "no FROM": ((tmp_path / "missing.pth", new), "there is no checkpoint .*missing.pth"),
        "empty FROM": (("", new), "no checkpoint is named"),
        "folder without weights": ((tmp_path / "empty", new), "holds no checkpoint"),
        "damaged": ((damaged, new), "neither safetensors.* or is cut short"),
        "code": ((tmp_path / "evil.pth", new), "refused: its pickle asks for posix.mkdir"),
        "another network": ((tmp_path / "resnet.pth", new), "no BiT network of the family: it has layer1.0.conv1"),
        "of no member": ((tmp_path / "root.safetensors", new), "no BiT network of the family: it has root.conv"),
        "incomplete": ((tmp_path / "part.pth", new), "6 parameters differ.*missing in the checkpoint"),
        "more": ((tmp_path / "more.pth", new), "ema.weight .*missing in the network"),
        "half a head": ((tmp_path / "unbiased.pth", new), r"head.conv.bias \(missing in the checkpoint"),
        "no head's shape": ((tmp_path / "scalar.pth", new), r"head.conv.weight \(\(\) in the checkpoint"),
        "not finite": ((tmp_path / "nan.pth", new), "not finite, in head.gn.bias"),
        "ending": ((ours, tmp_path / "new.bin"), "expected one of .safetensors, .pth, .pth.tar, .npz, or say"),
        "timm npz": ((ours, new, "--to", "timm"), "expected one of .safetensors, .pth, .pth.tar, as --to timm"),
        "two formats": ((ours, new, "--to", "pth"), "expected one of .pth, .pth.tar, as --to pth"),
        "TO is there": ((ours, tmp_path / "there.npz"), "there.npz exists; .*--force"),
        "TO is a folder": ((ours, tmp_path / "empty", "--to", "npz", "--force"), "empty is a folder"),
        "no such folder": ((ours, tmp_path / "no" / "w.npz"), "there is no folder .*no"),
        "a name too long": ((ours, tmp_path / ("w" * 300 + ".npz")), "too long"),
    }


def everything(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_unusable_input_ends_with_2_and_changes_nothing(tmp_path, source, capsys):
    cases = unusable(tmp_path)
    before = everything(tmp_path)
    for case, (words, message) in cases.items():
        code, out, err = command(capsys, *words)
        assert (code, out) == (2, ""), case
        assert err.startswith("error: "), case
        assert re.search(message, err), (case, err)
        assert everything(tmp_path) == before, case


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_leaves_what_was_there(tmp_path, source, kind):
    (tmp_path / KINDS[kind]).write_text("mine")
    before = everything(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="could not be written .*nothing was changed"):
            convert(source, tmp_path / KINDS[kind], kind, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert everything(tmp_path) == before


def test_a_file_that_reads_back_otherwise_gets_no_name(tmp_path, source, monkeypatch):
    (tmp_path / "w.npz").write_text("mine")
    before = everything(tmp_path)
    correct = formats.write

    def bad(path, state, *rest, **options):
        correct(path, state | {"head.gn.weight": state["head.gn.weight"] * 1.0000002}, *rest, **options)

    monkeypatch.setattr(formats, "write", bad)
    with pytest.raises(UserError, match="does not read back as it was written, in head.gn.weight"):
        weights.convert(source, tmp_path / "w.npz", force=True)
    assert everything(tmp_path) == before


def test_an_interruption_leaves_nothing(tmp_path, source, monkeypatch):
    before = everything(tmp_path)

    def interrupted(path, *rest, **options):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(formats, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights.convert(source, tmp_path / "w.npz")
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("network", "form", "said"),
    [
        ("R50x1", "timm", 'for timm.create_model("resnetv2_50x1_bit", num_classes=7)'),
        ("R8x0.25-8px", "timm", "timm itself has no network of the shape of R8x0.25-8px"),
        ("R50x1", "pth", None),
    ],
)
def test_what_was_written_says_how_timm_takes_it(network, form, said):
    written = conversion.Written(network, 1000, 7, ("float32",), form, 4000, ())
    assert conversion.summary("x", written).splitlines()[1:] == ([said] if said else [])
