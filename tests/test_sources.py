"""Each kind of source, made by, or read against, a program that is not ours where there is one."""

import io
import os
import pickle
import struct

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image
from scipy.io import savemat
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.summary.writer.record_writer import masked_crc32c as reference_crc
from torchvision import datasets

from loaders import pack
from loaders.crc32c import crc32c, masked_crc32c
from loaders.shard import Pack
from tests.pictures import encoded, photo, tar_of


def run(*words):
    return pack.main([str(word) for word in words])


def packed(source, tmp_path, *options):
    """Key → (bytes, name of the class), and the pack."""
    assert run(source, tmp_path / "out.h5", "--workers", "0", "--force", *options) == 0
    opened = Pack.open(tmp_path / "out.h5")
    assert opened.verify() == []
    found = {
        opened.keys[i]: (opened.record(i).tobytes(), opened.class_names[opened.labels[i]]) for i in range(len(opened))
    }
    return found, opened


def refused(capsys, source, tmp_path, *options):
    assert run(source, tmp_path / "no.h5", "--workers", "0", *options) == 2
    assert not list(tmp_path.glob("*no*.h5*"))
    return capsys.readouterr().err


# Tars and patterns of them


@pytest.mark.parametrize("pattern", ["part-*.tar", "part-{0000..0002}.tar", "part-000[0-2].tar"])
def test_webdataset_shards_by_a_pattern(tmp_path, pattern):
    expected = {}
    for shard in range(3):
        members = {}
        for i in range(4):
            data = encoded(photo(10 * shard + i))
            members |= {f"{shard}{i}.jpg": data, f"{shard}{i}.cls": str((shard + i) % 4).encode()}
            expected[f"{shard}{i}.jpg"] = data, str((shard + i) % 4)
        tar_of(tmp_path / f"part-{shard:04d}.tar", members)
    found, opened = packed(tmp_path / pattern, tmp_path, "--shards", "2")
    assert found == expected
    assert opened.class_names == ["0", "1", "2", "3"]


def test_tars_without_folders_are_a_class_each(tmp_path):
    """As ImageNet's training set is distributed."""
    expected = {}
    for name in ("n02", "n01"):
        members = {f"{name}_{i}.JPEG": encoded(photo(i + len(name))) for i in range(2)}
        expected |= {f"{name}/{key}": (data, name) for key, data in members.items()}
        tar_of(tmp_path / f"{name}.tar", members)
    assert packed(tmp_path / "n*.tar", tmp_path)[0] == expected


def test_a_pattern_that_matches_nothing(tmp_path, capsys):
    assert "nothing at" in refused(capsys, tmp_path / "x-*.tar", tmp_path)


# TFRecord, framed by TensorBoard, the Example by Google's protobuf


@pytest.fixture(scope="module")
def example_class():
    """tf.train.Example, declared as TensorFlow's example.proto and feature.proto have it."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tf", syntax="proto3")
    kinds = {"bytes": 12, "float": 2, "int64": 3}
    for kind, number in kinds.items():
        message = file.message_type.add(name=f"{kind.capitalize()}List")
        message.field.add(name="value", number=1, label=3, type=number)
    feature = file.message_type.add(name="Feature")
    for number, kind in enumerate(kinds, 1):
        feature.field.add(
            name=f"{kind}_list", number=number, label=1, type=11, type_name=f".tf.{kind.capitalize()}List"
        )
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=1, type=9)
    entry.field.add(name="value", number=2, label=1, type=11, type_name=".tf.Feature")
    features.field.add(name="feature", number=1, label=3, type=11, type_name=".tf.Features.FeatureEntry")
    example = file.message_type.add(name="Example")
    example.field.add(name="features", number=1, label=1, type=11, type_name=".tf.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tf.Example"))


def example(cls, **features):
    message = cls()
    for name, value in features.items():
        feature = message.features.feature[name.replace("__", "/")]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        elif isinstance(value, list):
            feature.float_list.value.extend(value)
        else:
            feature.int64_list.value.append(value)
    return message.SerializeToString()


def write_tfrecord(path, records):
    with open(path, "wb") as file:
        writer = RecordWriter(file)
        for record in records:
            writer.write(record)
    return path


def imagenet(cls, first, count):
    for i in range(first, first + count):
        data = encoded(photo(i), "PNG" if i % 2 else "JPEG")
        text = {"image__class__synset": f"n{i % 300:04d}".encode(), "image__filename": f"{i}.JPEG".encode()}
        size = {"image__height": 40, "image__width": 60, "image__object__bbox__xmin": [0.5, 0.25]}
        yield data, example(cls, image__encoded=data, image__class__label=i % 300, **text, **size)


@pytest.mark.parametrize("how", ["pattern", "folder", "one"])
def test_tfrecord_in_the_layout_of_imagenet(tmp_path, example_class, how):
    folder = tmp_path / "records"
    folder.mkdir()
    expected = {}
    for shard in range(1 if how == "one" else 3):
        made = list(imagenet(example_class, 295 + 5 * shard, 5))
        write_tfrecord(folder / f"train-{shard:05d}-of-00003", [record for _, record in made])
        for i, (data, _) in enumerate(made):
            number = 295 + 5 * shard + i
            expected[f"train-{shard:05d}-of-00003/{i:07d}/{number}.JPEG"] = data, f"n{number % 300:04d}"
    source = {"pattern": folder / "train-*", "folder": folder, "one": folder / "train-00000-of-00003"}[how]
    found, opened = packed(source, tmp_path)
    assert found == expected
    assert len(opened.class_names) == 300
    assert opened.labels.tolist() == [(295 + i) % 300 for i in range(len(expected))]


def test_tfrecord_with_no_more_than_image_and_label(tmp_path, example_class):
    images = [encoded(photo(i)) for i in range(3)]
    records = [example(example_class, image__encoded=d, image__class__label=8 * k) for k, d in enumerate(images)]
    found, opened = packed(write_tfrecord(tmp_path / "a.tfrecord", records), tmp_path)
    assert [data for data, _ in found.values()] == images
    assert opened.labels.tolist() == [0, 8, 16]


def test_damaged_tfrecords_are_named(tmp_path, example_class, capsys):
    records = [record for _, record in imagenet(example_class, 0, 4)]
    whole = write_tfrecord(tmp_path / "a.tfrecord", records).read_bytes()
    path = tmp_path / "b.tfrecord"
    for cut in (1, 3, 20, len(records[-1]), len(records[-1]) + 10):
        path.write_bytes(whole[:-cut])
        assert "b.tfrecord is truncated" in refused(capsys, path, tmp_path)
    second = 16 + len(records[0])
    for place, said in ((second + 3, "fails its checksum"), (second + 12 + len(records[1]) // 2, "")):
        broken = bytearray(whole)
        broken[place] ^= 1
        path.write_bytes(broken)
        if said:
            assert said in refused(capsys, path, tmp_path)
        else:  # within the second image: the record's own checksum tells, and only this one is left out
            assert run(path, tmp_path / "c.h5", "--workers", "0") == 1
            assert "does not match its checksum" in capsys.readouterr().err
            assert len(Pack.open(tmp_path / "c.h5")) == 3
    path.write_bytes(write_tfrecord(tmp_path / "d", [example(example_class, image__encoded=b"x")]).read_bytes())
    assert "image/class/label" in refused(capsys, path, tmp_path)
    path.write_bytes(write_tfrecord(tmp_path / "d", [b"\xff" * 50]).read_bytes())
    assert "tf.train.Example" in refused(capsys, path, tmp_path)


def test_crc32c_is_the_published_one():
    """RFC 3720, B.4, and TensorBoard's."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"") == 0
    rng = np.random.default_rng(0)
    for length in [*range(1, 12), 127, 128, 129, 255, 256, 1000, 4097, 70_001]:
        data = rng.bytes(length)
        assert masked_crc32c(data) == reference_crc(data), length


# LMDB


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


# CIFAR


def write_cifar(root, classes):
    """Random pictures in the binary layout; the pixels and labels of each part."""
    rng = np.random.default_rng(classes)
    root.mkdir()
    small = classes == 10
    files = {"train": [f"data_batch_{k}.bin" for k in range(1, 6)], "test": ["test_batch.bin"]}
    files = files if small else {"train": ["train.bin"], "test": ["test.bin"]}
    parts = {}
    for part, names in files.items():
        pixels = rng.integers(0, 256, (6 * len(names), 32, 32, 3), dtype=np.uint8)
        labels = rng.integers(0, classes, len(pixels), dtype=np.uint8)
        for k, name in enumerate(names):
            rows = [
                (b"" if small else b"\x07") + bytes([label]) + picture.transpose(2, 0, 1).tobytes()
                for picture, label in list(zip(pixels, labels, strict=True))[6 * k : 6 * k + 6]
            ]
            (root / name).write_bytes(b"".join(rows))
        parts[part] = pixels, labels
    name = "batches.meta.txt" if small else "fine_label_names.txt"
    (root / name).write_text("".join(f"class{k}\n" for k in range(classes)) + "\n")
    return parts


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_binaries_are_packed_pixel_for_pixel(tmp_path, classes):
    parts = write_cifar(tmp_path / "cifar", classes)
    for part, (pixels, labels) in parts.items():
        found, opened = packed(tmp_path / "cifar", tmp_path, "--under", part)
        assert list(found) == [f"{part}/{i:05d}.png" for i in range(len(labels))]
        images = [np.asarray(Image.open(io.BytesIO(data))) for data, _ in found.values()]
        np.testing.assert_array_equal(np.stack(images), pixels)
        assert opened.labels.tolist() == labels.tolist()
        assert opened.class_names == [f"class{k}" for k in range(classes)]
    assert len(packed(tmp_path / "cifar", tmp_path)[0]) == sum(len(labels) for _, labels in parts.values())


def test_a_truncated_cifar_is_named(tmp_path, capsys):
    write_cifar(tmp_path / "cifar", 10)
    os.truncate(tmp_path / "cifar/data_batch_3.bin", 7000)
    assert "data_batch_3.bin" in refused(capsys, tmp_path / "cifar", tmp_path)
    (tmp_path / "cifar/data_batch_3.bin").unlink()
    assert "data_batch_3.bin" in refused(capsys, tmp_path / "cifar", tmp_path)
    assert "train or test" in refused(capsys, tmp_path / "cifar", tmp_path, "--under", "val")


# Flowers-102 and Pets, against torchvision


def test_flowers_as_torchvision_reads_it(tmp_path, monkeypatch):
    root = tmp_path / "flowers-102"
    (root / "jpg").mkdir(parents=True)
    for number in range(1, 31):
        (root / f"jpg/image_{number:05d}.jpg").write_bytes(encoded(photo(number)))
    order = np.random.default_rng(0).permutation(30) + 1
    savemat(root / "imagelabels.mat", {"labels": np.resize(np.arange(1, 9), 30)[None].astype(np.uint8)})
    savemat(root / "setid.mat", {"trnid": order[None, :8], "valid": order[None, 8:16], "tstid": order[None, 16:]})
    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)  # it knows the real files' sums
    for part, parts in {"train": ["train"], "trainval": ["train", "val"], "test": ["test"]}.items():
        theirs = [datasets.Flowers102(tmp_path, split=split) for split in parts]
        expected = {f"jpg/{p.name}": label for d in theirs for p, label in zip(d._image_files, d._labels, strict=True)}
        _, opened = packed(root, tmp_path, "--under", part)
        assert dict(zip(opened.keys, opened.labels.tolist(), strict=True)) == expected
        assert len(opened.class_names) == 8
    assert len(packed(root, tmp_path)[0]) == 30


def test_flowers_that_are_incomplete(tmp_path, capsys):
    root = tmp_path / "flowers"
    root.mkdir()
    for name in ("imagelabels.mat", "setid.mat"):
        (root / name).write_bytes(b"no matrix")
    assert "102flowers.tgz" in refused(capsys, root, tmp_path)
    (root / "jpg").mkdir()
    assert "imagelabels.mat" in refused(capsys, root, tmp_path)


def test_pets_as_torchvision_reads_them(tmp_path):
    root = tmp_path / "oxford-iiit-pet"
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    lines = {"trainval": [], "test": []}
    for k, breed in enumerate(["Abyssinian", "american_bulldog", "Bengal"]):
        for i in range(6):
            kind = "GIF" if (k, i) == (2, 0) else "JPEG"  # some of the real files have the wrong extension
            (root / f"images/{breed}_{i}.jpg").write_bytes(encoded(photo(10 * k + i), kind))
            lines["test" if i % 3 == 2 else "trainval"].append(f"{breed}_{i} {k + 1} 1 {k + 1}\n")
    for part, rows in lines.items():
        (root / f"annotations/{part}.txt").write_text("".join(rows))
    for part in lines:
        theirs = datasets.OxfordIIITPet(tmp_path, split=part)
        _, opened = packed(root, tmp_path, "--under", part)
        expected = {f"images/{p.name}": label for p, label in zip(theirs._images, theirs._labels, strict=True)}
        assert dict(zip(opened.keys, opened.labels.tolist(), strict=True)) == expected
        assert opened.class_names == ["Abyssinian", "american_bulldog", "Bengal"]
    assert len(packed(root, tmp_path)[0]) == 18


# Tables


def test_csv_of_paths_labels_patients_and_splits(tmp_path):
    (tmp_path / "pics/a").mkdir(parents=True)
    rows = ["Path,Label,patient_id,split"]
    for i in range(8):
        (tmp_path / f"pics/a/{i}.jpg").write_bytes(encoded(photo(i)))
        rows.append(f'"pics/a/{i}.jpg",{"ill, very" if i % 2 else "well"},p{i // 3},{"test" if i > 5 else "train"}')
    rows = [rows[0], *(row.replace("ill, very", '"ill, very"') for row in rows[1:])]
    table = tmp_path / "all.csv"
    table.write_text("\ufeff" + "\n".join(rows))
    found, opened = packed(table, tmp_path)
    assert {key: name for key, (_, name) in found.items()} == {
        f"pics/a/{i}.jpg": "ill, very" if i % 2 else "well" for i in range(8)
    }
    assert opened.groups.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert list(packed(table, tmp_path, "--under", "test")[0]) == ["pics/a/6.jpg", "pics/a/7.jpg"]
    train, _ = packed(table, tmp_path, "--part", "train", "--holdout", "0.4")
    assert {int(key[7]) // 3 for key in train}.isdisjoint({int(k[7]) // 3 for k in found.keys() - train.keys()})


def test_csv_of_numbers(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(photo(i), "PNG"))
    (tmp_path / "t.tsv").write_text("class\tfile\n5\t0.png\n0\t1.png\n05\t2.png\n")
    _, opened = packed(tmp_path / "t.tsv", tmp_path)
    assert opened.labels.tolist() == [5, 0, 5]
    assert len(opened.class_names) == 6


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [("path,kind\na,b\n", [], "label"), ("path,label\n,3\n", [], "line 2"), ("path,label\n", [], "no rows"),
     ("path,image,label\n", [], "rename"), ("path,label\nx.jpg,1\n", ["--under", "test"], "split"),
     ("path,label\nabsent.jpg,1\n", [], "absent.jpg"), ('path,label\n"x.jpg,1\n', [], "table"),
     ("path,label\nx.jpg,1\nx.jpg,1\n", [], "two samples")],
)  # fmt: skip
def test_tables_that_cannot_be_used(tmp_path, capsys, text, options, said):
    (tmp_path / "t.csv").write_text(text)
    assert said in refused(capsys, tmp_path / "t.csv", tmp_path, *options)


def test_a_length_that_is_absurd_is_no_trap(tmp_path, capsys):
    """A valid checksum over a length of 2**62."""
    head = struct.pack("<Q", 1 << 62)
    (tmp_path / "a.tfrecord").write_bytes(head + struct.pack("<I", reference_crc(head)) + b"abc")
    assert "truncated" in refused(capsys, tmp_path / "a.tfrecord", tmp_path)
