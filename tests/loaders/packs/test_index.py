"""Indexes that lie: written into the file behind a checksum that is right, and without one that is."""

import h5py
import numpy as np
import pytest

from loaders.errors import UserError
from loaders.packs.hdf5 import index_checksum
from loaders.packs.shard import Pack
from loaders.packs.writer import Record, ShardWriter, new_attributes
from tests.support.pictures import encoded, photo

N = 6


def write(path, vectors=False):
    names = ["a", "b", "c"]
    with ShardWriter(path, names, new_attributes({}, 1)[0]) as writer:
        for k in range(N):
            label = [0.0, 1.0, float("nan")] if vectors else k % 3
            writer.add(Record(encoded(photo(k)), f"image {k}", label, 40, 60))
        writer.finish()
        writer.publish()
    return path


def change(path, name, place, value):
    with h5py.File(path, "r+") as file:
        file[name][place] = value


def reseal(path):
    """Let the checksum be right again."""
    with h5py.File(path, "r") as file:
        blob = file["images/bytes"]
        span, at = (blob.id.get_offset(), blob.size), file["index_crc32"].id.get_offset()
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(index_checksum(path, span, at).to_bytes(4, "little"))


LIES = {
    "a label within range": (False, "labels", 2, 0, None),
    "a label of -2": (False, "labels", 2, -2, "record 2 has label -2"),
    "a label beyond the classes": (False, "labels", 4, 3, "record 4 has label 3, of 3 classes"),
    "a size of 0": (False, "images/sizes", (1, 0), 0, "record 1 has 60x0 pixels"),
    "a negative size": (False, "images/sizes", (5, 1), -60, "record 5 has -60x40 pixels"),
    "offsets that fall": (False, "images/offsets", 3, 1, "record 2 does not begin"),
    "offsets far away": (False, "images/offsets", 3, 1 << 40, "record 3 does not begin"),
    "a negative offset": (False, "images/offsets", 0, -8, "record 0 does not begin"),
    "a label vector beyond 1": (True, "labels", (3, 1), 2.0, "record 3 has a label"),
    "an infinite label": (True, "labels", (3, 1), float("-inf"), "record 3 has a label"),
    "another key": (False, "keys", 0, b"image 7", None),
    "other counts": (False, "classes/counts", 0, 9, None),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_is_refused_when_the_pack_is_opened(tmp_path, lie):
    vectors, name, place, value, said = LIES[lie]
    path = write(tmp_path / "p.h5", vectors)
    assert len(Pack.open(path)) == N
    change(path, name, place, value)
    with pytest.raises(UserError, match=said or "does not match its checksum"):
        Pack.open(path)
    reseal(path)
    if said:
        with pytest.raises(UserError, match=said):
            Pack.open([path])
    else:  # nothing in it can tell
        assert len(Pack.open(path)) == N


@pytest.mark.parametrize(("name", "array"), [
    ("labels", np.zeros((N, 2), np.float32)), ("labels", np.zeros(N, np.float32)),
    ("images/sizes", np.ones((N, 3), np.int32)), ("images/sizes", np.ones(N, np.int32)),
    ("images/crc32", np.zeros(N, np.float32)), ("keys", np.arange(N)), ("groups", np.zeros((N, 2), np.int64)),
    ("classes/counts", np.zeros(2, np.int64)),
])  # fmt: skip
def test_arrays_of_another_form_are_refused(tmp_path, name, array):
    path = write(tmp_path / "p.h5")
    with h5py.File(path, "r+") as file:
        if name in file:
            del file[name]
        file[name] = array
    with pytest.raises(UserError, match="damaged"):
        Pack.open(path)


def test_flipped_bits_in_the_index_are_noticed(tmp_path):
    """200 single bits of everything that is not an image: a UserError each, or the very same pack."""
    path = write(tmp_path / "p.h5")
    whole = path.read_bytes()
    with h5py.File(path, "r") as file:
        blob = file["images/bytes"]
        images = range(blob.id.get_offset(), blob.id.get_offset() + blob.size)
    outside = [at for at in range(len(whole)) if at not in images]
    random = np.random.default_rng(0)
    for at in random.choice(outside, 200, replace=False).tolist():
        data = bytearray(whole)
        data[at] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
        with pytest.raises(UserError):
            Pack.open(path)
