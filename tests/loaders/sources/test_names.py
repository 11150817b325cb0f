"""Names that are no text, and names that repeat."""

import json
import os
import random

import h5py
import pytest

from loaders.packs.shard import Pack
from loaders.sources.names import as_name, as_text, telling_apart, typed
from tests.support.packing import packed, refused, run
from tests.support.pictures import encoded, photo, tar_of

LATIN = os.fsdecode(b"caf\xe9.jpg")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"caf\xe9.jpg", "caf%E9.jpg"),
        ("café.jpg".encode(), "café.jpg"),
        (b"100%.jpg", "100%.jpg"),
        (b"caf%C3%A9.jpg", "caf%C3%A9.jpg"),  # as in a URL: nothing that had to be escaped
        (b"caf%E9.jpg", "caf%25E9.jpg"),  # could be taken for the first one
        (b"caf%25E9.jpg", "caf%2525E9.jpg"),
        (b"100%25.jpg", "100%25.jpg"),
        (b"\xe9/100%.jpg", "%E9/100%.jpg"),
        (b"a\nb\x1b[31m.jpg", "a%0Ab%1B[31m.jpg"),
    ],
)
def test_names_as_text(name, text):
    assert as_text(os.fsdecode(name)) == text
    assert as_name(text) == os.fsdecode(name)
    assert typed(os.fsdecode(name)) in (text, os.fsdecode(name))


def test_every_name_comes_back_and_no_two_become_one():
    pieces = [b"%", b"25", b"E9", b"C3", b"\xc3\xa9", b"\xe9", b"%E9", b"%25", b"\n", b"\xff", b"/", b"%C3%A9", b"\0"]
    chance, seen = random.Random(1), {}
    for _ in range(20_000):
        name = b"".join(chance.choices(pieces, k=chance.randrange(1, 6)))
        text = as_text(name.decode(errors="surrogateescape"))
        assert as_name(text).encode(errors="surrogateescape") == name
        assert seen.setdefault(text.encode(), name) == name


def latin_folder(root):
    """Names of two encodings, in files and in a class: {text: bytes}."""
    files = {}
    for number, (name, text) in enumerate(
        [(b"caf\xe9/\xe9t\xe9.jpg", "caf%E9/%E9t%E9.jpg"), (b"caf\xe9/100%25.jpg", "caf%E9/100%25.jpg"),
         ("thé/é%E9.jpg".encode(), "thé/é%25E9.jpg"), (b"th\xc3\xa9/%E9.jpg", "thé/%25E9.jpg")]
    ):  # fmt: skip
        place = os.path.join(os.fsencode(root), name)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        files[text] = encoded(photo(number))
        with open(place, "wb") as file:
            file.write(files[text])
    return files


@pytest.mark.parametrize("kind", ["folder", "wrapped", "tar", "csv", "lmdb"])
def test_names_of_another_encoding_are_packed(tmp_path, kind):
    source = tmp_path / "source"
    files = latin_folder(source / "données" if kind == "wrapped" else source)
    if kind == "tar":
        tar_of(tmp_path / "a.tar", {as_name(name): data for name, data in files.items()})
        source = tmp_path / "a.tar"
    if kind == "lmdb":
        lmdb = pytest.importorskip("lmdb")
        source = tmp_path / "a.lmdb"
        with lmdb.open(str(source), map_size=1 << 24) as made, made.begin(write=True) as writing:
            files |= {"thé/%00%01%00": files["thé/é%25E9.jpg"]}  # a number as a key
            for name, data in files.items():
                writing.put(os.fsencode(as_name(name)), data)
    if kind == "csv":
        source = source / "list.csv"
        rows = b"".join(os.fsencode(f"{as_name(name)},{k % 2}\n") for k, name in enumerate(files))
        source.write_bytes(b"path,label\n" + rows)
    found, opened = packed(source, tmp_path)
    assert {key: data for key, (data, _) in found.items()} == files
    if kind != "csv":
        assert opened.class_names == ["caf%E9", "thé"]
    with h5py.File(tmp_path / "out.h5") as file:  # as any other program reads it
        assert set(file["keys"].asstr()) == set(files)


def test_a_class_of_another_encoding_is_chosen_as_typed_or_as_printed(tmp_path, capsys):
    latin_folder(tmp_path / "source")
    for word in ("caf%E9", os.fsdecode(b"caf\xe9")):
        for option in ("--classes", "--under"):
            found, opened = packed(tmp_path / "source", tmp_path, option, word)
            assert set(found) == {"caf%E9/%E9t%E9.jpg", "caf%E9/100%25.jpg"}, (option, word)
    assert run("info", tmp_path / "out.h5") == 0
    assert "caf%E9" in capsys.readouterr().out


def test_a_source_of_another_encoding_and_bad_files_in_it(tmp_path, capsys):
    source = tmp_path / os.fsdecode(b"donn\xe9es")
    latin_folder(source)
    (source / "thé" / LATIN).write_bytes(b"no image")
    assert run(source, tmp_path / "out.h5", "--workers", "0", "--skip-bad", "--set", "level=1") == 0
    assert "bad: thé/caf%E9.jpg: " in capsys.readouterr().err
    opened = Pack.open(tmp_path / "out.h5")
    assert opened.attributes["source"].endswith("/donn%E9es")
    assert json.loads(opened.attributes["left_out"])[0][0] == "thé/caf%E9.jpg"


def test_a_label_of_another_encoding_is_refused(tmp_path, capsys):
    (tmp_path / "a.csv").write_bytes(b"path,label\na.jpg,caf\xe9\n")
    assert "iconv" in refused(capsys, tmp_path / "a.csv", tmp_path)


def shards(root, names, labels=True, folder=""):
    """Tars whose names begin anew in each: {key within the tar: …} of each."""
    files = {}
    for number, name in enumerate(names):
        members = {f"{folder}{k:04d}.jpg": encoded(photo(10 * number + k)) for k in range(3)}
        files |= {f"{name.removesuffix('.tar')}/{key}": data for key, data in members.items()}
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        beside = {f"{folder}{k:04d}.cls": str(k % 2).encode() for k in range(3)} if labels else {}
        tar_of(root / name, members | beside)
    return files


@pytest.mark.parametrize(
    ("names", "pattern"), [(["t-0.tar", "t-1.tar"], "t-*.tar"), (["a/t.tar", "b/t.tar"], "*/t.tar")]
)
def test_names_that_begin_anew_in_each_tar(tmp_path, capsys, names, pattern):
    files = shards(tmp_path / "webdataset", names)
    found, _ = packed(tmp_path / "webdataset" / pattern, tmp_path)
    assert {key: data for key, (data, _) in found.items()} == files
    assert "the tar is part of each" in capsys.readouterr().out
    assert [label for _, (_, label) in sorted(found.items())] == ["0", "1", "0"] * 2
    files = shards(tmp_path / "folders", names, labels=False, folder="cat/")
    found, opened = packed(tmp_path / "folders" / pattern, tmp_path)
    assert {key: data for key, (data, _) in found.items()} == files
    assert opened.class_names == ["cat"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/x/a.rec", "/y/b.rec"], ["a.rec", "b.rec"]),
        (["/x/1/a.rec", "/x/2/a.rec", "/x/b.rec"], ["1/a.rec", "2/a.rec", "b.rec"]),
        (["1/a.rec", "2/3/a.rec"], ["1/a.rec", "2/3/a.rec"]),
        ([os.fsdecode(b"\xe9.rec")], ["%E9.rec"]),
    ],
)
def test_shards_are_told_apart_by_as_little_as_it_takes(paths, names):
    assert telling_apart(paths) == names


def test_names_that_do_not_repeat_stay_as_they_are(tmp_path):
    members = {f"{k}.jpg": encoded(photo(k)) for k in range(4)}
    for part, own in enumerate(([0, 1], [2, 3])):
        beside = {f"{k}.cls": b"1" for k in own}
        tar_of(tmp_path / f"t-{part}.tar", {f"{k}.jpg": members[f"{k}.jpg"] for k in own} | beside)
    assert set(packed(tmp_path / "t-*.tar", tmp_path)[0]) == set(members)
