"""Small files that ask for much: memory and time are not taken before sizes were compared with what can be."""

import io
import os
import socket
import zipfile

import h5py
import numpy as np
import pytest
import torch

from engine.config.loading import load
from engine.config.schema import PretrainConfig
from engine.network import weights
from engine.saving import checkpoint
from engine.transfer import sweep_file
from loaders.errors import UserError
from loaders.packing.find import find_source, kinds, list_source
from loaders.packs.shard import Pack
from loaders.sources.classes import expand
from tests.fuzz.readers import READERS
from tests.support.refusals import little_memory

KERNEL = "resnet/root_block/standardized_conv2d/kernel"
SPARE = 64 << 20


def npz_of_zeros():
    out = io.BytesIO()
    np.savez_compressed(out, **{KERNEL: np.zeros(SPARE // 4, np.float32)})
    return out.getvalue()


def npz_with_a_header_that_lies():
    array, out = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": (1 << 33,)})
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(f"{KERNEL}.npy", array.getvalue() + bytes(64))
    return out.getvalue()


def pth_with_strides_of_0():
    out = io.BytesIO()
    torch.save({"root.conv.weight": torch.zeros(1).expand(1 << 20, 1 << 11)}, out)
    return out.getvalue()


def pth_of_zeros():
    plain, out = io.BytesIO(), io.BytesIO()
    torch.save({"root.conv.weight": torch.zeros(SPARE // 4)}, plain)
    with zipfile.ZipFile(plain) as before, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as after:
        for name in before.namelist():
            after.writestr(name, before.read(name))
    return out.getvalue()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (npz_of_zeros, "unpacks to 67,"),
        (npz_with_a_header_that_lies, "is said to be of"),
        (pth_with_strides_of_0, "lie on top of each other"),
        (pth_of_zeros, "unpacks to 67,"),
    ],
)
def test_weights_that_ask_for_much_are_refused(made, said, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(made())
    assert path.stat().st_size < 1 << 20
    with little_memory(SPARE // 2), pytest.raises(UserError, match=said):
        weights.load(path)


def many_labels(file, place):
    del file["labels"]
    file.create_dataset("labels", (1 << 31,), "<i8", chunks=(1 << 16,))


def many_bytes(file, place):
    del file["images/bytes"]
    file.create_dataset("images/bytes", (1 << 40,), "u1", chunks=(1 << 16,))


def without_storage(file, place):
    del file["labels"]
    file.create_dataset("labels", (1 << 31,), "<i8")


def linked(file, place):
    del file["labels"]
    file["labels"] = h5py.ExternalLink(str(place / "other.h5"), "labels")


def a_group_that_is_linked(file, place):
    del file["images"]
    file["images"] = h5py.ExternalLink(str(place / "other.h5"), "images")


def softly_linked(file, place):
    file["inside"] = h5py.ExternalLink(str(place / "other.h5"), "/")
    del file["labels"]
    file["labels"] = h5py.SoftLink("/inside/labels")


def stored_outside(file, place):
    del file["labels"]
    file.create_dataset("labels", (4,), "<i8", external=[("/etc/hostname", 0, 32)])


def virtual(file, place):
    del file["labels"]
    layout = h5py.VirtualLayout((4,), "<i8")
    layout[:] = h5py.VirtualSource(str(place / "other.h5"), "labels", (4,))
    file.create_virtual_dataset("labels", layout)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (many_labels, "labels is of 17,179,869,184 bytes"),
        (many_bytes, "images/bytes is of 1,099,511,627,776 bytes"),
        (without_storage, "labels is of 17,179,869,184 bytes"),
        (linked, "labels is a link, outside"),
        (a_group_that_is_linked, "images/bytes is a link, outside"),
        (softly_linked, "labels is a link, outside"),
        (stored_outside, "labels lies in other files, outside"),
        (virtual, "labels lies in other files, outside"),
    ],
)
def test_packs_that_ask_for_much_or_lead_elsewhere_are_refused(change, said, tmp_path):
    sound = READERS["a pack"][1]()
    (tmp_path / "other.h5").write_bytes(sound)
    (tmp_path / "a.h5").write_bytes(sound)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        change(file, tmp_path)
    with little_memory(SPARE), pytest.raises(UserError, match=said):
        Pack.open(tmp_path / "a.h5")


def test_a_compressed_copy_of_a_pack_is_read(tmp_path):
    (tmp_path / "a.h5").write_bytes(READERS["a pack"][1]())
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        labels = file["labels"][...]
        del file["labels"]
        file.create_dataset("labels", data=labels, chunks=(2,), compression="gzip")
    with pytest.raises(UserError, match="checksum"):  # it is another file now, and that is all that is wrong
        Pack.open(tmp_path / "a.h5")


@pytest.mark.parametrize("pattern", ["a-{0..999999999}.tar", "{0..999}-{0..999}.tar", "a-{0..99999999999999999999}"])
def test_ranges_of_too_many_files_are_refused(pattern):
    with pytest.raises(UserError, match=r"stands for .* files; up to 100,000"):
        expand(pattern)


def test_ranges_that_go_down_or_of_one_stand_for_none_or_one():
    assert expand("a-{5..3}.tar") == []
    assert expand("a-{07..07}.tar") == ["a-07.tar"]


@pytest.fixture(params=["pipe", "socket", "device"])
def endless(request, tmp_path):
    """Something that is no file; whoever reads it waits, or never ends."""
    path = tmp_path / "a.yaml"
    if request.param == "device":
        path.symlink_to("/dev/zero")
    elif request.param == "pipe":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(path))
    return path


@pytest.mark.parametrize("kind", [None, *kinds()])
def test_sources_are_files_or_folders(endless, kind):
    with pytest.raises(UserError, match="is no file, but a pipe, a socket or a device"):
        list_source(find_source(str(endless), kind), str(endless), None, {})


@pytest.mark.parametrize(
    "read",
    [Pack.open, sweep_file.read, weights.load, lambda path: load(PretrainConfig, str(path), [], "pretrain")],
    ids=["pack", "sweep", "weights", "recipe"],
)
def test_what_is_read_is_a_file(endless, read):
    with pytest.raises(UserError):
        read(endless)


def test_a_checkpoint_whose_description_is_a_pipe_is_damaged(tmp_path):
    os.mkfifo(tmp_path / "about.json")
    with pytest.raises(UserError, match="about.json is no file"):
        checkpoint.load(tmp_path)


WORDS = ["data.train=a", "data.val=b"]


def test_of_the_environment_only_listed_names_are_read(monkeypatch, tmp_path):
    monkeypatch.setenv("API_TOKEN", "secret")
    monkeypatch.setenv("RUNS", "/somewhere")
    monkeypatch.delenv("BOOSTERBIT_ENV", raising=False)
    path = tmp_path / "a.yaml"
    path.write_text("name: ${oc.env:API_TOKEN}\nextends: cifar10_small\n")
    (tmp_path / "cifar10_small.yaml").write_text("model: {name: R50x1}\n")
    with pytest.raises(UserError, match=r"oc\.env:API_TOKEN} is not read.*BOOSTERBIT_ENV=API_TOKEN") as told:
        load(PretrainConfig, str(path), WORDS, "pretrain")
    assert "secret" not in str(told.value)
    assert (
        load(PretrainConfig, "cifar10_small", [*WORDS, "folder=${oc.env:RUNS}/a"], "pretrain").folder == "/somewhere/a"
    )
    with pytest.raises(UserError, match="is not read"):
        load(PretrainConfig, "cifar10_small", [*WORDS, "folder=${oc.env:API_TOKEN}"], "pretrain")
    monkeypatch.setenv("BOOSTERBIT_ENV", "OTHER,API_TOKEN")
    assert load(PretrainConfig, str(path), WORDS, "pretrain").name == "secret"


def test_a_sweep_reads_listed_names_only(monkeypatch, tmp_path):
    monkeypatch.setenv("API_TOKEN", "secret")
    (tmp_path / "a.yaml").write_text("name: ${oc.env:API_TOKEN}\n")
    with pytest.raises(UserError, match=r"a\.yaml: \${oc\.env:API_TOKEN} is not read"):
        sweep_file.read(tmp_path / "a.yaml")
