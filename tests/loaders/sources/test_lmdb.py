"""Images in LMDB, in each of the layouts that are in use."""

import os
import pickle
import struct

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from loaders.packs.shard import Pack
from loaders.sources.wire.lmdb_file import LmdbFile
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


@pytest.mark.parametrize(("entries", "longest"), [(0, 1), (1, 9), (700, 300), (9000, 40)])
def test_the_database_is_read_as_the_library_reads_it(tmp_path, entries, longest):
    lmdb = pytest.importorskip("lmdb", reason="the package lmdb is not installed")
    random = np.random.default_rng(entries)
    there = {}
    with lmdb.open(str(tmp_path), map_size=1 << 26) as environment:
        for _ in range(2):  # in two transactions, with holes: pages are used again
            with environment.begin(write=True) as transaction:
                for k in range(entries):
                    key = b"%d-" % random.integers(10**6) + random.bytes(int(random.integers(longest)))
                    value = random.bytes(int(random.integers(1, 20 if k % 50 else 20_000)))
                    transaction.put(key, value)
                for key in [key for n, (key, _) in enumerate(transaction.cursor()) if n % 7 == 3]:
                    transaction.delete(key)
        with environment.begin() as transaction:
            there = dict(transaction.cursor())
    database = LmdbFile(str(tmp_path / "data.mdb"))
    found = [(key, value[:]) for key, value in database.items()]
    assert found == list(there.items())
    assert all(database.get(key)[:] == value for key, value in list(there.items())[::17])
    assert all(database.get(key + b"\0") is None for key in list(there)[::17]) and database.get(b"") is None


def test_a_value_that_is_cut_away_while_it_is_held_is_an_error(tmp_path):
    database = LmdbFile(str(write_lmdb(tmp_path / "a", {"k": bytes(50_000)}) / "data.mdb"))
    value = database.get(b"k")
    os.truncate(tmp_path / "a" / "data.mdb", 9000)
    assert len(value) == 50_000
    with pytest.raises(ValueError, match="ends before byte 12,304"):
        value[:]


def by_hand(page, values, depth=1):
    """An LMDB of two descriptions, a leaf and the pages of its values, as mdb.c of LMDB 0.9 lays them out."""

    def meta(transaction, depth, root):
        trees = [struct.pack("<IHHQQQQQ", page, *tree) for tree in (
            (8, 0, 0, 0, 0, 0, 2**64 - 1), (0, depth, 0, 1, len(overflow) // page, len(values), root))]  # fmt: skip
        last = 2 + len(overflow) // page
        return struct.pack("<IIQQ", 0xBEEFC0DE, 1, 0, 1 << 30) + b"".join(trees) + struct.pack("<QQ", last, transaction)

    nodes, places, overflow, at = b"", [], b"", page
    for key, value in values.items():
        first = 3 + len(overflow) // page
        node = struct.pack("<HHHH", len(value) & 0xFFFF, len(value) >> 16, 1, len(key)) + key + struct.pack("<Q", first)
        node += bytes(len(node) % 2)
        pages = -(-(len(value) + 16) // page)
        overflow += (struct.pack("<QHHI", first, 0, 4, pages) + value).ljust(pages * page, b"\0")
        at -= len(node)
        places.append(at)
        nodes = node + nodes
    pages = [struct.pack("<QHHHH", n, 0, 8, 0, 0) + meta(n, depth, 2) for n in (0, 1)]
    leaf = struct.pack("<QHHHH", 2, 0, 2, 16 + 2 * len(places), at) + struct.pack(f"<{len(places)}H", *places)
    return b"".join(each.ljust(page, b"\0") for each in pages) + leaf.ljust(at, b"\0") + nodes + overflow


@pytest.mark.parametrize("page", [512, 4096, 65536])
def test_pages_of_any_size(tmp_path, page):
    """Of a machine's memory pages: 64 KiB on some. The last value ends with the file."""
    values = {b"a": b"1" * 10, b"b": b"2" * (page - 16)}
    (tmp_path / "data.mdb").write_bytes(by_hand(page, values))
    found = LmdbFile(str(tmp_path / "data.mdb"))
    assert {key: span[:] for key, span in found.items()} == values
    assert {key: found.get(key)[:] for key in values} == values


@pytest.mark.parametrize("depth", [0, 33])
def test_a_tree_without_a_depth_is_named(tmp_path, depth):
    (tmp_path / "data.mdb").write_bytes(by_hand(4096, {b"a": b"1"}, depth))
    with pytest.raises(ValueError, match=f"depth {depth}"):
        LmdbFile(str(tmp_path / "data.mdb"))
