import os
import pickle
import random
import re
from pathlib import Path

import h5py
import numpy as np
import pytest

from loaders.errors import UserError
from loaders.packs.shard import Pack
from loaders.packs.writer import Record, ShardWriter, new_attributes

DOCS = Path(__file__).parents[3] / "docs"


def write(path, records=7, shards=1, labels=None):
    """A pack of made-up bytes: what is under test here is the container. Returns the records' bytes."""
    rng = random.Random(5)
    data = [rng.randbytes(rng.randrange(1, 300)) for _ in range(records)]
    attributes = new_attributes({"source": "made up", "kind": "test"}, shards)
    bounds = [round(k * records / shards) for k in range(shards + 1)]
    for k in range(shards):
        name = path if shards == 1 else path.with_name(f"{path.stem}-{k:05d}-of-{shards:05d}.h5")
        with ShardWriter(name, ["no", "yes"], attributes[k]) as writer:
            for i in range(bounds[k], bounds[k + 1]):
                label = i % 2 if labels is None else labels[i]
                writer.add(Record(data[i], f"sample {i} ü", label, 10 + i, 20 + i, group=i // 2))
            writer.finish()
            writer.publish()
    return data


@pytest.mark.parametrize("shards", [1, 3])
def test_records_come_back_in_order_without_a_copy(tmp_path, shards):
    data = write(tmp_path / "p.h5", shards=shards)
    opened = Pack.open(tmp_path / "p.h5")
    assert [opened.record(i).tobytes() for i in range(len(opened))] == data
    assert [piece.tobytes() for piece in opened.records(np.array([5, 0, 5]))] == [data[5], data[0], data[5]]
    assert opened.image_bytes == opened.nbytes == sum(map(len, data))
    assert opened.keys[-1] == "sample 6 ü"
    assert list(opened.keys) == [f"sample {i} ü" for i in range(7)]
    assert opened.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert opened.groups.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert opened.sizes.tolist() == [[10 + i, 20 + i] for i in range(7)]
    assert opened.class_counts.tolist() == [4, 3]
    assert not opened.record(0).flags.owndata
    assert not opened.record(0).flags.writeable
    with pytest.raises(IndexError):
        opened.record(7)


def test_unknown_labels_stay_unknown(tmp_path):
    labels = [[1.0, np.nan], [0.0, 1.0], [np.nan, np.nan]]
    write(tmp_path / "p.h5", records=3, labels=labels)
    opened = Pack.open(tmp_path / "p.h5")
    np.testing.assert_array_equal(opened.labels, np.array(labels, dtype=np.float32))
    assert opened.class_counts.tolist() == [1, 1]


def test_a_pack_travels_to_worker_processes(tmp_path):
    data = write(tmp_path / "p.h5", shards=2)
    again = pickle.loads(pickle.dumps(Pack.open(tmp_path / "p.h5")))
    assert [again.record(i).tobytes() for i in range(7)] == data


def test_several_packs_read_as_one(tmp_path):
    first, second = write(tmp_path / "a.h5"), write(tmp_path / "b.h5", shards=2)
    opened = Pack.open([tmp_path / "a.h5", tmp_path / "b.h5"])
    assert [opened.record(i).tobytes() for i in range(14)] == first + second


def test_every_flipped_bit_is_found(tmp_path):
    """Anywhere in the file: in an image, the index, HDF5's own structure; found by opening or by verifying."""
    path = tmp_path / "p.h5"
    write(path, records=20)
    whole = path.read_bytes()
    rng = random.Random(1)
    places = {rng.randrange(len(whole)) for _ in range(300)} | set(range(48))
    unnoticed = []
    for place in sorted(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            if not Pack.open(path).verify():
                unnoticed.append(place)
        except UserError:
            continue
    assert unnoticed == []


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_pack_is_refused_when_opened(tmp_path, share):
    path = tmp_path / "p.h5"
    write(path, records=50)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(UserError, match="p.h5"):
        Pack.open(path)


def test_one_byte_less_is_refused(tmp_path):
    path = tmp_path / "p.h5"
    write(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError, match="truncated|damaged"):
        Pack.open(path)


@pytest.mark.parametrize("beyond", [1, 8, 1 << 20])
@pytest.mark.parametrize("name", ["images/bytes", "images/offsets", "labels", "keys", "groups"])
def test_an_array_that_goes_on_behind_the_end_of_the_file_is_refused(tmp_path, name, beyond):
    """As HDF5's older files may say, which have no checksum over where their arrays lie."""
    write(tmp_path / "p.h5")
    path = tmp_path / "old.h5"
    with h5py.File(tmp_path / "p.h5") as file, h5py.File(path, "w", libver="earliest") as copy:
        copy.attrs.update(file.attrs)
        for each in ("images", "labels", "keys", "groups", "classes"):
            file.copy(each, copy, each)
    assert Pack.open(path).verify() == []
    with h5py.File(path) as file:
        place, length = file[name].id.get_offset(), file[name].id.get_storage_size()
    whole = path.read_bytes()
    said = place.to_bytes(8, "little") + length.to_bytes(8, "little")
    assert whole.count(said) == 1
    moved = (len(whole) - length + beyond).to_bytes(8, "little")
    path.write_bytes(whole.replace(said, moved + said[8:]))
    with pytest.raises(UserError, match="old.h5 is damaged"):
        Pack.open(path)


def foreign(path, what):
    if what == "not HDF5":
        path.write_bytes(b"\x89PNG" * 100)
    elif what == "other HDF5":
        with h5py.File(path, "w") as file:
            file["x"] = [1, 2]
    elif what == "newer version":
        write(path)
        with h5py.File(path, "a") as file:
            file.attrs["version"] = 99
    elif what == "lacks labels":
        write(path)
        with h5py.File(path, "a") as file:
            del file["labels"]
    elif what == "folder":
        path.mkdir()


@pytest.mark.parametrize("what", ["missing", "not HDF5", "other HDF5", "newer version", "lacks labels", "folder"])
def test_what_is_not_a_pack_is_refused_by_name(tmp_path, what):
    foreign(tmp_path / "p.h5", what)
    with pytest.raises(UserError, match="p.h5") as refused:
        Pack.open(tmp_path / "p.h5")
    assert "pack" in str(refused.value)


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path / "p.h5", shards=3)
    (tmp_path / "p-00001-of-00003.h5").unlink()
    with pytest.raises(UserError, match="p-00001-of-00003.h5"):
        Pack.open(tmp_path / "p.h5")


def test_shards_of_two_packings_do_not_mix(tmp_path):
    write(tmp_path / "p.h5", shards=2)
    kept = (tmp_path / "p-00000-of-00002.h5").read_bytes()
    write(tmp_path / "p.h5", shards=2)
    (tmp_path / "p-00000-of-00002.h5").write_bytes(kept)
    with pytest.raises(UserError, match="another packing"):
        Pack.open(tmp_path / "p.h5")


@pytest.mark.parametrize("storage", [{"chunks": (64,)}, {"chunks": (64,), "compression": "gzip"}])
def test_a_pack_that_someone_repacked_is_still_read(tmp_path, storage):
    """As `h5repack` may do: the images chunked or compressed, so that no memory map fits."""
    data = write(tmp_path / "p.h5")
    with h5py.File(tmp_path / "p.h5") as file, h5py.File(tmp_path / "q.h5", "w") as copy:
        copy.attrs.update(file.attrs)
        for name in ("images/offsets", "images/sizes", "images/crc32", "labels", "keys", "groups", "classes/names",
                     "classes/counts"):  # fmt: skip
            file.copy(name, copy, name)
        copy.create_dataset("images/bytes", data=file["images/bytes"][...], **storage)
    opened = Pack.open(tmp_path / "q.h5")
    assert [opened.record(i).tobytes() for i in range(7)] == data
    assert opened.verify() == []


def test_the_documented_way_to_read_a_pack_without_this_project_works(tmp_path):
    """The code in docs/pack-format.md, run as it stands there."""
    data = write(tmp_path / "train.h5")
    text = (DOCS / "pack-format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "loaders" not in code
    found = {}
    exec(code.replace("train.h5", str(tmp_path / "train.h5")), found)
    assert bytes(found["image"]) == data[found["i"]]
    assert found["label"] == found["i"] % 2
    assert found["key"] == f"sample {found['i']} ü"
