import contextlib
import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from engine.network import bit, states, weights
from loaders.errors import UserError
from tests.support.weight_files import CLASSES, NAME, contents, equal, official_arrays, randomized, timm_state


@pytest.fixture
def state():
    return randomized().state_dict()


def test_safetensors_and_folders(tmp_path, state):
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    assert equal(weights.load(tmp_path / "weights.safetensors"), state)
    assert equal(weights.load(str(tmp_path)), state)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("entry", [None, "model", "state_dict"])
def test_pytorch_files(tmp_path, state, entry, prefix, legacy):
    content = {prefix + name: tensor for name, tensor in state.items()}
    if entry:
        content = {entry: content, "epoch": 89, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    torch.save(content, tmp_path / "model.pth.tar", _use_new_zipfile_serialization=not legacy)
    assert equal(weights.load(tmp_path / "model.pth.tar"), state)


def test_official_file(tmp_path):
    model = randomized()
    np.savez(tmp_path / "BiT-S.npz", **official_arrays(model))
    assert equal(weights.load(tmp_path / "BiT-S.npz"), model.state_dict())


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_timms_names(tmp_path, ending, linear):
    model = randomized()
    theirs = timm_state(model)
    if linear:
        theirs["head.fc.weight"] = theirs["head.fc.weight"][:, :, 0, 0].clone()
    save = torch.save if ending == "pth" else safetensors.torch.save_file
    save(theirs, tmp_path / f"timm.{ending}")
    assert equal(weights.load(tmp_path / f"timm.{ending}"), model.state_dict())


@pytest.mark.parametrize("name", ["resnet50", "resnetv2_50", "vit_small_patch16_224"])
def test_timms_other_networks_are_told_apart(tmp_path, name):
    timm = pytest.importorskip("timm", reason="timm, the reference, is not installed")
    with torch.device("meta"):
        names = timm.create_model(name).state_dict()
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "timm.pth")
    state = weights.load(tmp_path / "timm.pth")
    assert list(state) == list(names)
    fails_and_changes_nothing(bit.build(NAME, CLASSES), state, "something else .*give a checkpoint of a BiT network")


def test_official_file_gives_timms_outputs(tmp_path):
    timm = pytest.importorskip("timm", reason="timm, the reference, is not installed")
    np.savez(tmp_path / "BiT-S-R50x1.npz", **official_arrays(randomized("R50x1", 9)))
    theirs = timm.create_model("resnetv2_50x1_bit", num_classes=9)
    theirs.load_pretrained(str(tmp_path / "BiT-S-R50x1.npz"))
    ours = bit.build("R50x1", 9)
    weights.apply(ours, weights.load(tmp_path / "BiT-S-R50x1.npz"), new_head=False)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, actual = theirs.eval()(images), ours.eval()(images)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_apply_with_the_same_head(state):
    model = bit.build(NAME, CLASSES)
    weights.apply(model, state, new_head=False)
    assert equal(model.state_dict(), state)


@pytest.mark.parametrize("classes", [CLASSES, 3])
def test_apply_with_a_new_head(state, classes):
    model = bit.build(NAME, classes)
    weights.apply(model, state, new_head=True)
    assert torch.count_nonzero(model.head.conv.weight) == 0
    body = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.conv")}
    assert all(torch.equal(tensor, state[name]) for name, tensor in body.items())
    assert len(body) == len(state) - 2
    del state["head.conv.weight"], state["head.conv.bias"]
    weights.apply(model, state, new_head=True)


def test_half_weights_fill_a_single_precision_model(state):
    model = bit.build(NAME, CLASSES)
    weights.apply(model, {name: tensor.bfloat16() for name, tensor in state.items()}, new_head=False)
    assert model.root.conv.weight.dtype == torch.float32
    assert torch.equal(model.root.conv.weight, state["root.conv.weight"].bfloat16().float())


def fails_and_changes_nothing(model, state, message, new_head=False):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        weights.apply(model, state, new_head=new_head)
    assert equal(model.state_dict(), before)


def test_another_head(state):
    message = f"for {CLASSES} classes and this network's for 10; .*new_head.*num_classes={CLASSES}"
    fails_and_changes_nothing(bit.build(NAME, 10), state, message)


@pytest.mark.parametrize("new_head", [False, True])
def test_another_network(state, new_head):
    message = f"of {NAME} and this network is R20x0.25-32px: .*missing in the checkpoint"
    fails_and_changes_nothing(bit.build("R20x0.25-32px", CLASSES), state, message, new_head)


def test_no_network_of_the_family(state):
    model = bit.build(NAME, CLASSES)
    fails_and_changes_nothing(model, {"layer1.0.conv1.weight": torch.zeros(3)}, "something else .*layer1.0.conv1")
    fails_and_changes_nothing(model, {}, "is empty")
    del state["body.block2.unit01.gn2.bias"]
    fails_and_changes_nothing(model, state, r"1 parameters differ.*block2.unit01.gn2.bias \(missing")


@pytest.mark.parametrize("name", bit.MEMBERS)
def test_members_are_told_by_their_shapes(name):
    with torch.device("meta"):
        assert weights.member(bit.build(name, 5).state_dict()) == name


def test_names_with_absurd_numbers_are_of_no_member(state):
    state[f"body.block{10**30}.unit01.conv1.weight"] = state["stages.0.blocks.9999999.conv1.weight"] = torch.zeros(1)
    fails_and_changes_nothing(bit.build(NAME, CLASSES), state, f"of {NAME} .* 2 parameters differ")


def test_weights_that_are_not_finite(tmp_path, state):
    state["body.block1.unit01.gn1.bias"][3] = float("nan")
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="not finite, in body.block1.unit01.gn1.bias"):
        weights.load(tmp_path / "w.safetensors")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_that_ask_for_more_are_refused(tmp_path, legacy):
    trap = str(tmp_path / "trap")
    torch.save({"model": Evil(trap)}, tmp_path / "evil.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="refused: its pickle asks for posix.mkdir"):
        weights.load(tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil(trap)))
    with pytest.raises(UserError, match="evil|plain"):
        weights.load(tmp_path / "plain.pth")
    np.savez(tmp_path / "evil.npz", a=np.array([Evil(trap)], dtype=object))
    with pytest.raises(UserError, match="damaged, or not an .npz of arrays alone|official"):
        weights.load(tmp_path / "evil.npz")
    assert not os.path.exists(trap)


def test_what_is_not_a_checkpoint(tmp_path, state):
    with pytest.raises(UserError, match="no checkpoint is named"):
        weights.load("")
    with pytest.raises(UserError, match="there is no checkpoint .*missing.pth"):
        weights.load(tmp_path / "missing.pth")
    with pytest.raises(UserError, match="weights.safetensors"):
        weights.load(tmp_path)
    for content in (b"", b"\xff\xd8\xff\xe0 a picture", b"x" * 100):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(UserError, match="neither safetensors"):
            weights.load(tmp_path / "file")
    with zipfile.ZipFile(tmp_path / "file", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match="neither safetensors"):
        weights.load(tmp_path / "file")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="expected a state dict"):
        weights.load(tmp_path / "list.pth")
    torch.save({0: torch.zeros(3)}, tmp_path / "numbers.pth")
    with pytest.raises(UserError, match="dict of 0; expected a state dict"):
        weights.load(tmp_path / "numbers.pth")
    torch.save({"model": {"epoch": 3}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="dict of epoch"):
        weights.load(tmp_path / "other.pth")
    np.savez(tmp_path / "other.npz", **{"resnet/block1/unit01/d/kernel": np.zeros(3)})
    with pytest.raises(UserError, match="block1/unit01/d/kernel"):
        weights.load(tmp_path / "other.npz")


@pytest.mark.parametrize("kind", ["safetensors", "pth", "legacy", "npz"])
@pytest.mark.parametrize("part", [0.0001, 0.5, 0.999])
def test_cut_files(tmp_path, kind, part):
    content = contents()[kind]
    (tmp_path / "cut").write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError):
        weights.load(tmp_path / "cut")


@pytest.mark.parametrize("kind", ["safetensors", "pth", "legacy", "npz"])
def test_damaged_files_are_refused_or_give_numbers(tmp_path, kind):
    """Never a traceback of zipfile, pickle or NumPy, whatever byte is another."""
    content, random_numbers = contents()[kind], random.Random(1)
    for _ in range(60):
        damaged = bytearray(content)
        start = random_numbers.choice((0, len(content) - 4000))
        for _ in range(3):
            damaged[start + random_numbers.randrange(4000)] = random_numbers.randrange(256)
        (tmp_path / "damaged").write_bytes(damaged)
        with contextlib.suppress(UserError):
            assert weights.load(tmp_path / "damaged")


def wrapped(state, how):
    """A state by the names that wrappers give; `mixed`: of some parts only, as where a part was compiled alone."""
    return {
        "module": {f"module.{name}": value for name, value in state.items()},
        "compiled": {f"_orig_mod.{name}": value for name, value in state.items()},
        "both": {f"_orig_mod.module.{name}": value for name, value in state.items()},
        "other way": {f"module._orig_mod.{name}": value for name, value in state.items()},
        "twice": {f"module.module.{name}": value for name, value in state.items()},
        "mixed": {name.replace("body.block1.", "body.block1._orig_mod."): value for name, value in state.items()},
        "some": {name.replace("head.", "module.head."): value for name, value in state.items()},
        "averaged": {"n_averaged": torch.tensor(3)} | {f"module.{name}": value for name, value in state.items()},
        "attribute": {f"model.{name}": value for name, value in state.items()},
        "deep": {f"model._orig_mod.backbone.{name}": value for name, value in state.items()},
        "beside": {f"net.{name}": value for name, value in state.items()} | {"criterion.weight": torch.zeros(3)},
    }[how]  # fmt: skip


WAYS = ("module", "compiled", "both", "other way", "twice", "mixed", "some", "averaged", "attribute", "deep", "beside")


@pytest.mark.parametrize("names", ["ours", "timm"])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("how", WAYS)
def test_prefixes_of_wrappers_are_taken_away_anywhere(tmp_path, how, ending, names):
    model = randomized()
    state = wrapped(timm_state(model) if names == "timm" else model.state_dict(), how)
    path = tmp_path / f"weights.{ending}"
    if ending == "pth":
        torch.save({"state_dict": state}, path)
    else:
        safetensors.torch.save_file({name: value.contiguous() for name, value in state.items()}, path)
    found, said = weights.read(path)
    assert equal(found, model.state_dict())
    plain = names == "timm" and how == "mixed"  # timm has no part of that name
    assert bool(said) is not plain


def test_plain_weights_are_read_without_a_word(tmp_path, state):
    torch.save({"model": state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3}, tmp_path / "a.pth")
    assert weights.read(tmp_path / "a.pth").said == []


@pytest.mark.parametrize("entry", states.AVERAGED)
@pytest.mark.parametrize("beside", ["state_dict", "model", None])
def test_averaged_weights_are_what_is_meant_and_it_is_said(tmp_path, state, entry, beside):
    """As timm takes them, which writes `state_dict_ema`, and torchvision's `model_ema`, with a counter."""
    others = {name: torch.zeros_like(value) for name, value in state.items()}
    averaged = {"n_averaged": torch.tensor(7)} | {f"module.{name}": value for name, value in state.items()}
    torch.save({entry: averaged, **({beside: others} if beside else {})}, tmp_path / "a.pth")
    found, said = weights.read(tmp_path / "a.pth")
    assert equal(found, state)
    assert said[0] == f"took the averaged weights, {entry}" + (f", not {beside}" if beside else "")


@pytest.mark.parametrize("entry", states.PLAIN)
def test_entries_that_others_write(tmp_path, state, entry):
    torch.save({"epoch": 1, entry: state, "state_dict_ema": None}, tmp_path / "a.pth")
    assert equal(weights.load(tmp_path / "a.pth"), state)


def test_an_entry_within_an_entry(tmp_path, state):
    torch.save({"model": {"state_dict": state, "arch": "R50"}}, tmp_path / "a.pth")
    assert equal(weights.load(tmp_path / "a.pth"), state)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda sgd: sgd, "state of an optimizer and no weights; give the file that the model"),
        (lambda sgd: {"optimizer": sgd, "epoch": 3}, r"state of an optimizer \(optimizer\) and no weights"),
        (lambda sgd: {"optimizer": sgd, "scaler": {}, "step": 5}, "give the folder that it is in"),
        (lambda sgd: {"model": sgd}, r"state of an optimizer \(model\)"),
        (lambda sgd: {}, "an empty dict"),
        (lambda sgd: {"state_dict": {}}, "dict of state_dict; expected"),
    ],
)
def test_an_optimizers_state_is_told(tmp_path, content, said):
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0, momentum=0.9)
    torch.save(content(sgd.state_dict()), tmp_path / "a.pth")
    with pytest.raises(UserError, match=said):
        weights.load(tmp_path / "a.pth")


def test_several_networks_and_tensors_that_differ_are_told(tmp_path, state):
    two = {f"{name}.{key}": value for name in ("encoder_q", "encoder_k") for key, value in state.items()}
    torch.save(two, tmp_path / "two.pth")
    with pytest.raises(UserError, match="several networks: encoder_k, encoder_q"):
        weights.load(tmp_path / "two.pth")
    torch.save(state | {"module.head.conv.bias": state["head.conv.bias"] + 1}, tmp_path / "differ.pth")
    with pytest.raises(UserError, match="two tensors for head.conv.bias"):
        weights.load(tmp_path / "differ.pth")
    torch.save(state | {"module.head.conv.bias": state["head.conv.bias"].clone()}, tmp_path / "same.pth")
    assert equal(weights.load(tmp_path / "same.pth"), state)


def test_a_file_that_holds_itself_is_told(tmp_path):
    content = {}
    content["model"] = content
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match="expected a state dict"):
        weights.load(tmp_path / "a.pth")


def test_the_digest_is_that_of_the_weights_not_of_their_file(tmp_path, state):
    torch.save({f"module.{name}": value for name, value in reversed(state.items())}, tmp_path / "a.pth")
    safetensors.torch.save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "b.safetensors")
    digests = {weights.digest(weights.load(path)) for path in (tmp_path / "a.pth", tmp_path / "b.safetensors")}
    assert digests == {weights.digest(state)}
    for changed in (
        state | {"head.conv.bias": state["head.conv.bias"] + 1e-3},
        {name: value.half() for name, value in state.items()},
        {name.replace("gn1", "gn9"): value for name, value in state.items()},
    ):
        assert weights.digest(changed) not in digests
