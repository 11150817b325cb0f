"""TFRecord, framed by TensorBoard, the Example by Google's protobuf."""

import struct

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.summary.writer.record_writer import masked_crc32c as reference_crc

from loaders.packs.shard import Pack
from loaders.sources.wire.crc32c import crc32c, masked_crc32c
from tests.support.packing import packed, refused, run
from tests.support.pictures import encoded, photo


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


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [("int64", [3], ""), ("float", [3.0], ""), ("bytes", [b"3"], ""), ("bytes", [b" 3.0\n"], ""),
     ("bytes", [b"03"], ""),
     ("int64", [3, 4], "int64_list, holds 2 values"), ("float", [3, 3], "float_list, holds 2 values"),
     ("bytes", [b"3", b"3"], "bytes_list, holds 2 values"), ("bytes", [], "bytes_list, is empty"),
     ("int64", [], "int64_list, is empty"), ("float", [], "float_list, is empty"),
     (None, [], "without a list, is empty"),
     ("float", [2.5], "float_list: the label is 2.5"), ("float", [float("nan")], "nan"),
     ("float", [float("inf")], "inf"), ("float", [-1.0], "-1.0 is no class number"), ("bytes", [b"-1"], "-1 is no"),
     ("int64", [-1], "-1 is no class number"), ("bytes", [b"cat"], "bytes_list, holds the name 'cat'"),
     ("bytes", [b"\x03"], "bytes_list"), ("bytes", [b"\xff"], "bytes_list"), ("bytes", [b""], "empty")],
)  # fmt: skip
@pytest.mark.parametrize("packs", [True, False])
def test_a_label_is_read_by_its_tag(tmp_path, capsys, example_class, kind, values, said, packs):
    message = example_class()
    message.features.feature["image/encoded"].bytes_list.value.append(encoded(photo(0)))
    feature = message.features.feature["image/class/label"]
    if kind:
        listed = getattr(feature, f"{kind}_list")
        listed.SetInParent()
        listed.value.extend(values)
    data = message.SerializeToString()
    if not packs and kind in ("int64", "float") and len(values) == 1:  # each number with a tag, as proto2 writes them
        inner = listed.SerializeToString()
        body = inner[2:] if len(inner) < 100 else b""
        tagged = (b"\x08" if kind == "int64" else b"\x0d") + body
        assert example_class.FromString(data) == message
        key = b"\x0a\x11image/class/label"
        number = {"float": 2, "int64": 3}[kind]
        value = bytes([number << 3 | 2, len(tagged)]) + tagged
        entry = key + bytes([0x12, len(value)]) + value
        del message.features.feature["image/class/label"]
        rest = message.features.SerializeToString() + bytes([0x0A, len(entry)]) + entry
        data = b"\x0a" + bytes([len(rest) & 0x7F | 0x80, len(rest) >> 7]) + rest
        assert list(getattr(example_class.FromString(data).features.feature["image/class/label"],
                            f"{kind}_list").value) == pytest.approx(values, nan_ok=True)  # fmt: skip
    path = write_tfrecord(tmp_path / "a.tfrecord", [data])
    if said:
        error = refused(capsys, path, tmp_path)
        assert said in error
        assert "image/class/label" in error
    else:
        assert packed(path, tmp_path)[1].labels.tolist() == [3]


def test_an_image_that_is_no_single_string_is_named(tmp_path, capsys, example_class):
    for features in ({"image__encoded": 3}, {"image__encoded": [0.5]}):
        path = write_tfrecord(tmp_path / "a", [example(example_class, image__class__label=1, **features)])
        assert "image/encoded is a " in refused(capsys, path, tmp_path)


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


def test_a_length_that_is_absurd_is_no_trap(tmp_path, capsys):
    """A valid checksum over a length of 2**62."""
    head = struct.pack("<Q", 1 << 62)
    (tmp_path / "a.tfrecord").write_bytes(head + struct.pack("<I", reference_crc(head)) + b"abc")
    assert "truncated" in refused(capsys, tmp_path / "a.tfrecord", tmp_path)
