import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from loaders import pack
from loaders.errors import UserError
from loaders.packing import spreading as packing
from loaders.packs.shard import Pack
from tests.support.packing import run
from tests.support.pictures import deep_png, encoded, folder, gray16, photo, tar_of


def contents(opened):
    return {opened.keys[i]: opened.record(i).tobytes() for i in range(len(opened))}


@pytest.mark.parametrize("options", [[], ["--shards", "3"], ["--workers", "0"], ["--workers", "2", "--shards", "2"]])
@pytest.mark.parametrize("source", ["folder", "tar"])
def test_a_folder_and_a_tar_of_it_are_packed_byte_for_byte(tmp_path, source, options):
    files = folder(tmp_path / "images")
    place = tmp_path / "images"
    if source == "tar":
        place = tmp_path / "images.tar"
        tar_of(place, files)
    assert run(place, tmp_path / "out.h5", *options) == 0
    opened = Pack.open(tmp_path / "out.h5")
    assert contents(opened) == files
    assert opened.class_names == ["bird", "cat", "dog"]
    assert opened.class_counts.tolist() == [4, 4, 4]
    assert opened.labels.tolist() == [opened.class_names.index(key.split("/")[0]) for key in opened.keys]
    assert opened.sizes.tolist() == [[40, 60]] * 12
    assert opened.verify() == []
    if "--shards" in options:
        count = int(options[options.index("--shards") + 1])
        assert len(list(tmp_path.glob("out-*-of-*.h5"))) == count
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("label", ["cls", "json"])
def test_a_webdataset_tar(tmp_path, label):
    members, expected = {}, {}
    for index in range(6):
        data = encoded(photo(index))
        members[f"part/{index:03d}.jpg"] = expected[f"part/{index:03d}.jpg"] = data
        text = str(index % 3) if label == "cls" else json.dumps({"label": index % 3, "other": 1})
        members[f"part/{index:03d}.{label}"] = text.encode()
    tar_of(tmp_path / "a.tar", members)
    assert run(tmp_path / "a.tar", tmp_path / "a.h5") == 0
    opened = Pack.open(tmp_path / "a.h5")
    assert contents(opened) == expected
    assert opened.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_the_digits_are_those_of_scikit_learn(tmp_path):
    assert run("sklearn:digits", tmp_path / "d.h5", "--workers", "1") == 0
    opened, reference = Pack.open(tmp_path / "d.h5"), load_digits()
    assert len(opened) == 1797
    images = np.stack([np.asarray(Image.open(io.BytesIO(opened.record(i).tobytes())), float) for i in range(1797)])
    digits = np.array([int(opened.class_names[label]) for label in opened.labels])

    # Whatever the order, the same pictures with the same labels: 0..16 in scikit-learn, 0..255 in the pack.
    def ranked(pixels, labels):
        return sorted(zip(labels.tolist(), np.rint(pixels).astype(int).reshape(len(pixels), -1).tolist(), strict=True))

    assert ranked(images * 16 / 255, digits) == ranked(reference.images, reference.target)


def test_the_two_parts_of_a_split_are_all_and_stratified(tmp_path):
    options = ["--classes", "3,7", "--holdout", "0.25"]
    for part in ("all", "train", "test"):
        assert run("sklearn:digits", tmp_path / f"{part}.h5", "--part", part, *options) == 0
    whole, train, test = (Pack.open(tmp_path / f"{part}.h5") for part in ("all", "train", "test"))
    assert set(train.keys) | set(test.keys) == set(whole.keys)
    assert not set(train.keys) & set(test.keys)
    assert whole.class_names == train.class_names == ["3", "7"]
    for total, held in zip(whole.class_counts, test.class_counts, strict=True):
        assert held / total == pytest.approx(0.25, abs=0.01)


def test_resizing_re_encodes_only_larger_images(tmp_path):
    files = folder(tmp_path / "images", per_class=2, classes=("a",), height=40, width=60)
    small = encoded(photo(9, 16, 20))
    (tmp_path / "images/a/small.jpg").write_bytes(small)
    assert run(tmp_path / "images", tmp_path / "out.h5", "--resize", "20") == 0
    opened = Pack.open(tmp_path / "out.h5")
    assert sorted(opened.sizes.tolist()) == [[16, 20], [20, 30], [20, 30]]
    found = contents(opened)
    assert found["a/small.jpg"] == small
    for key, data in files.items():
        ours = np.asarray(Image.open(io.BytesIO(found[key])), dtype=float)
        reference = Image.open(io.BytesIO(data)).resize((30, 20), Image.Resampling.BICUBIC)
        assert np.abs(ours - np.asarray(reference, dtype=float)).mean() < 8  # JPEG of few, colourful pixels


def awkward():
    """Name → (bytes, height, width as displayed, whether bytes are kept)."""
    base = photo(3)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    deep = (np.asarray(base.convert("L")).astype(np.uint16) * 257).astype("<u2")
    return {
        "rotated.jpg": (encoded(base, exif=exif), 60, 40, True),
        "cmyk.jpg": (encoded(base.convert("CMYK")), 40, 60, False),
        "progressive.jpg": (encoded(base, progressive=True), 40, 60, True),
        "gray.jpg": (encoded(base.convert("L")), 40, 60, True),
        "deep.png": (encoded(Image.fromarray(deep), "PNG"), 40, 60, True),
        "deep.tif": (encoded(Image.fromarray(deep), "TIFF"), 40, 60, False),
        "deep_colour.png": (deep_png(base), 40, 60, False),
        "palette.png": (encoded(base.convert("P"), "PNG"), 40, 60, True),
        "transparent.png": (encoded(base.convert("RGBA"), "PNG"), 40, 60, True),
        "really_a_png.jpg": (encoded(base, "PNG"), 40, 60, True),
        "map.bmp": (encoded(base, "BMP"), 40, 60, False),
        "really_a_jpeg.png": (encoded(base), 40, 60, True),
        "really_a_gif.jpg": (encoded(base, "GIF"), 40, 60, False),
        "web.webp": (encoded(base, "WEBP"), 40, 60, False),
    }


@pytest.mark.parametrize("name", awkward())
def test_awkward_images_are_packed_as_they_look(tmp_path, name):
    data, height, width, kept = awkward()[name]
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a" / name).write_bytes(data)
    assert run(tmp_path / "images", tmp_path / "out.h5") == 0
    opened = Pack.open(tmp_path / "out.h5")
    stored = opened.record(0).tobytes()
    assert opened.sizes.tolist() == [[height, width]]
    assert (stored == data) == kept
    seen = Image.open(io.BytesIO(stored))
    assert seen.format in ("JPEG", "PNG")
    if name not in (
        "rotated.jpg",
        "palette.png",
        "really_a_gif.jpg",
    ):  # the one lies on its side, the other has few colours
        if name in ("deep.png", "deep.tif"):
            assert np.array_equal(np.asarray(seen), 257 * np.asarray(photo(3).convert("L"), dtype=int))
            assert opened.bits == 16
            return
        mode = "L" if name == "gray.jpg" else "RGB"
        difference = np.asarray(seen.convert(mode), float) - np.asarray(photo(3).convert(mode), float)
        assert np.abs(difference).mean() < 4
        assert opened.bits == 8


def test_resizing_gray_of_16_bits_keeps_the_bits(tmp_path):
    """Against torch's bicubic filter in float64; edges from black to white must not wrap around."""
    pixels = gray16(1, 90, 120)
    pixels[30:60, 40:80] = np.where(np.arange(40) % 20 < 10, 0, 65535)
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/x.png").write_bytes(encoded(Image.fromarray(pixels), "PNG"))
    assert run(tmp_path / "images", tmp_path / "out.h5", "--resize", "30") == 0
    opened = Pack.open(tmp_path / "out.h5")
    assert (opened.sizes.tolist(), opened.bits) == ([[30, 40]], 16)
    found = np.asarray(Image.open(io.BytesIO(opened.record(0).tobytes())))
    assert found.dtype == np.uint16
    exact = torch.from_numpy(pixels.astype(float))[None, None]
    expected = torch.nn.functional.interpolate(exact, (30, 40), mode="bicubic", antialias=True)[0, 0].clamp(0, 65535)
    assert np.abs(found - expected.numpy()).max() < 1


@pytest.mark.parametrize("skip", [False, True])
def test_files_that_do_not_decode_are_named_and_left_out(tmp_path, capsys, skip):
    files = folder(tmp_path / "images")
    whole = files.pop("cat/0.jpg")
    (tmp_path / "images/cat/0.jpg").write_bytes(whole[: len(whole) // 2])
    files.pop("dog/1.png")
    (tmp_path / "images/dog/1.png").write_bytes(b"")
    code = run(tmp_path / "images", tmp_path / "out.h5", *(["--skip-bad"] if skip else []))
    assert code == (0 if skip else 1)
    said = capsys.readouterr().err
    assert "cat/0.jpg" in said
    assert "dog/1.png" in said
    assert contents(Pack.open(tmp_path / "out.h5")) == files


def test_a_pack_that_exists_is_replaced_only_when_told(tmp_path, capsys):
    folder(tmp_path / "one")
    folder(tmp_path / "two", per_class=2)
    assert run(tmp_path / "one", tmp_path / "out.h5", "--shards", "2") == 0
    assert run(tmp_path / "two", tmp_path / "out.h5") == 2
    assert "--force" in capsys.readouterr().err
    assert len(Pack.open(tmp_path / "out.h5")) == 12
    assert run(tmp_path / "two", tmp_path / "out.h5", "--force") == 0
    assert len(Pack.open(tmp_path / "out.h5")) == 6
    assert [path.name for path in tmp_path.glob("*.h5")] == ["out.h5"]


def unusable(tmp_path, what):
    if what == "missing":
        return [tmp_path / "absent"], "absent"
    if what == "empty folder":
        (tmp_path / "empty").mkdir()
        return [tmp_path / "empty"], "empty"
    if what == "no classes":
        (tmp_path / "flat").mkdir()
        (tmp_path / "flat/a.jpg").write_bytes(encoded(photo(1)))
        return [tmp_path / "flat"], "flat"
    if what == "nothing decodes":
        (tmp_path / "bad/a").mkdir(parents=True)
        (tmp_path / "bad/a/x.jpg").write_bytes(b"no image")
        return [tmp_path / "bad"], "x.jpg"
    if what == "truncated tar":
        tar_of(tmp_path / "a.tar", {f"a/{i}.jpg": encoded(photo(i, 200, 300)) for i in range(3)})
        data = (tmp_path / "a.tar").read_bytes()
        (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2])
        return [tmp_path / "cut.tar"], "cut.tar"
    if what == "not a tar":
        (tmp_path / "a.tar").write_bytes(b"hello" * 1000)
        return [tmp_path / "a.tar"], "a.tar"
    folder(tmp_path / "images")
    options = {
        "unknown class": (["--classes", "bird,cow"], "cow"),
        "unknown kind": (["--kind", "zip"], "zip"),
        "more shards than images": (["--shards", "13"], "13"),
        "no shards": (["--shards", "0"], "--shards"),
    }
    more, said = options[what]
    return [tmp_path / "images", *more], said


@pytest.mark.parametrize(
    "what",
    ["missing", "empty folder", "no classes", "nothing decodes", "truncated tar", "not a tar", "unknown class",
     "unknown kind", "more shards than images", "no shards"],
)  # fmt: skip
def test_input_that_cannot_be_used_is_said_so_and_leaves_nothing(tmp_path, capsys, what):
    (source, *options), said = unusable(tmp_path, what)
    assert run(source, tmp_path / "out.h5", *options) == 2
    message = capsys.readouterr().err
    assert "error: " in message
    assert said in message
    assert not list(tmp_path.glob("*out*"))


def test_a_full_disk_leaves_the_old_pack(tmp_path, monkeypatch, capsys):
    folder(tmp_path / "images")
    assert run(tmp_path / "images", tmp_path / "out.h5") == 0
    before = (tmp_path / "out.h5").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run(tmp_path / "images", tmp_path / "out.h5", "--force") == 2
    assert "No space left" in capsys.readouterr().err
    assert (tmp_path / "out.h5").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out.h5"]


def test_the_programs_speak_for_themselves(tmp_path):
    def spoken(*words):
        command = [sys.executable, "-m", "loaders.pack", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])

    assert "examples:" in spoken("--help").stdout
    assert spoken("sklearn:digits", tmp_path / "d.h5").returncode == 0
    assert "1,797 records, sound" in spoken("verify", tmp_path / "d.h5").stdout
    assert "classes    10" in spoken("info", tmp_path / "d.h5").stdout
    damaged = spoken("verify", tmp_path / "absent.h5")
    assert damaged.returncode == 2
    assert "Traceback" not in damaged.stderr


def test_unknown_labels_are_refused_before_decoding(tmp_path):
    with pytest.raises(UserError, match="--shards"):
        packing.pack("sklearn:digits", tmp_path / "d.h5", packing.Options(shards=0))


def test_info_to_a_reader_that_leaves(tmp_path):
    """`info X | head` ends without a word."""
    folder(
        tmp_path / "in", per_class=1, classes=tuple(f"a class with a long name {k:05d}" for k in range(2000)), height=4
    )
    assert run(tmp_path / "in", tmp_path / "p.h5", "--workers", "0") == 0
    words = [sys.executable, "-m", "loaders.pack", "info", str(tmp_path / "p.h5")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 141


def test_a_failure_without_a_file_says_what_was_packed(tmp_path, capsys, monkeypatch):
    folder(tmp_path / "in", per_class=1)

    def full(*words, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "ShardWriter", full)
    assert run(tmp_path / "in", tmp_path / "p.h5", "--workers", "0") == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "in") in said and str(tmp_path / "p.h5") in said and "No space left" in said


def test_the_best_quality_is_one(tmp_path):
    folder(tmp_path / "images", per_class=1)
    assert pack.main([str(tmp_path / "images"), str(tmp_path / "a.h5"), "--workers", "0", "--quality", "95"]) == 0


def test_an_interrupted_packing_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    folder(tmp_path / "images", per_class=1)
    monkeypatch.setattr(pack, "pack", interrupted)
    assert pack.main([str(tmp_path / "images"), str(tmp_path / "a.h5"), "--workers", "0"]) == 128 + signal.SIGINT
    assert "the same command goes on" in capsys.readouterr().err
