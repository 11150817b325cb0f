"""Images in LMDB, in each of the layouts that are in use."""

import os
import pickle

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from loaders.packs.shard import Pack
from tests.support.packing import packed, refused, run
from tests.support.pictures import encoded, photo


def write_lmdb(path, entries):
    lmdb = pytest.importorskip("lmdb", reason="the package lmdb is not installed")
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key.encode(), value)
    return path


def lmdb_layout(layout):
    """Entries of a database, and the key and class of each image."""
    images = {f"{i:08d}": (encoded(photo(i)), i % 3) for i in range(6)}
    if layout == "folders":
        entries = {f"c{label}/{key}.jpg": data for key, (data, label) in images.items()}
        return entries, {f"c{label}/{key}.jpg": (data, f"c{label}") for key, (data, label) in images.items()}
    if layout == "beside":
        entries = {f"image-{key}": data for key, (data, _) in images.items()}
        entries |= {f"label-{key}": str(label).encode() for key, (_, label) in images.items()}
        entries["num-samples"] = b"6"
        return entries, {f"image-{key}": (data, str(label)) for key, (data, label) in images.items()}
    plain = {key: (data, str(label)) for key, (data, label) in images.items()}
    if layout == "pickled":
        entries = {key: pickle.dumps((data, label)) for key, (data, label) in images.items()}
        return entries | {"__len__": pickle.dumps(6), "__keys__": pickle.dumps(list(images))}, plain
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", syntax="proto2")  # as in Caffe's caffe.proto
    message = file.message_type.add(name="Datum")
    for number, (name, kind) in enumerate(
        [("channels", 5), ("height", 5), ("width", 5), ("data", 12), ("label", 5), ("float_data", 2), ("encoded", 8)], 1
    ):
        message.field.add(name=name, number=number, label=3 if name == "float_data" else 1, type=kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    datum = message_factory.GetMessageClass(pool.FindMessageTypeByName("Datum"))
    entries = {
        key: datum(channels=3, height=40, width=60, data=data, label=label, encoded=True).SerializeToString()
        for key, (data, label) in images.items()
    }
    return entries, plain


@pytest.mark.parametrize("layout", ["folders", "beside", "pickled", "Datum"])
def test_lmdb(tmp_path, layout):
    entries, expected = lmdb_layout(layout)
    found, opened = packed(write_lmdb(tmp_path / "db", entries), tmp_path)
    assert found == expected
    assert len(opened.class_names) == 3


def test_lmdb_is_read_by_worker_processes(tmp_path):
    entries, expected = lmdb_layout("folders")
    write_lmdb(tmp_path / "db", entries)
    assert run(tmp_path / "db", tmp_path / "w.h5", "--workers", "2") == 0
    assert len(Pack.open(tmp_path / "w.h5")) == len(expected)


@pytest.mark.parametrize("label", [2, 2.0, "2", b"2", "2.0", " 02 "])
def test_labels_of_any_spelling(tmp_path, label):
    entries = {"a": pickle.dumps((encoded(photo(0)), label)), "b": pickle.dumps((encoded(photo(1)), 1))}
    assert packed(write_lmdb(tmp_path / "db", entries), tmp_path)[1].labels.tolist() == [2, 1]
    if not isinstance(label, int | float):
        text = label if isinstance(label, bytes) else label.encode()
        entries = {"image-a": encoded(photo(0)), "label-a": text, "image-b": encoded(photo(1)), "label-b": b"1"}
        assert packed(write_lmdb(tmp_path / "beside", entries), tmp_path)[1].labels.tolist() == [2, 1]


@pytest.mark.parametrize("label", [[2], 2.5, None, True, "", b"\x02", float("nan"), "1 2", {"a": 1}, -1])
def test_what_is_no_label_is_named(tmp_path, capsys, label):
    entries = {"a": pickle.dumps((encoded(photo(0)), label))}
    assert "the label is" in refused(capsys, write_lmdb(tmp_path / "db", entries), tmp_path)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    ("value", "said"),
    [(pickle.dumps((Harmful(), 1)), "mkdir"), (b"whatever", "expected"), (pickle.dumps([1, 2]), "pickled"),
     (pickle.dumps((b"x", -1)), "label"), (b"", "expected")],
)  # fmt: skip
def test_lmdb_of_something_else_is_refused_and_runs_no_code(tmp_path, capsys, monkeypatch, value, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, write_lmdb(tmp_path / "db", {"a/0": value}), tmp_path)
    assert not (tmp_path / "harm").exists()
