"""Which folders become classes, and what is said of those that do not."""

import numpy as np
import pytest

from loaders.errors import UserError
from loaders.sources.folders import find_classes
from loaders.sources.kinds import lmdb
from loaders.sources.listing import Bytes, Item, Listing
from tests.loaders.sources.test_lmdb import write_lmdb
from tests.support.packing import packed, refused
from tests.support.pictures import encoded, photo, tar_of


def source_of(tmp_path, kind, names):
    """A folder or a tar of images with these names."""
    members = {name: encoded(photo(i)) for i, name in enumerate(names)}
    if kind == "tar":
        tar_of(tmp_path / "in.tar", members)
        return tmp_path / "in.tar"
    for name, data in members.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    return tmp_path / "in"


PLAIN = ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg"]
JUNK = [".ipynb_checkpoints/0-checkpoint.jpg", "cat/.ipynb_checkpoints/1.jpg", "@eaDir/0.jpg", "dog/@eaDir/0.jpg",
        "__MACOSX/cat/._0.jpg", "$RECYCLE.BIN/0.jpg", ".Trash-1000/files/0.jpg", "lost+found/0.jpg"]  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_hidden_and_system_folders_are_no_classes_and_are_counted(tmp_path, capsys, kind):
    found, opened = packed(source_of(tmp_path, kind, PLAIN + JUNK), tmp_path)
    assert opened.class_names == ["cat", "dog"]
    assert sorted(found) == PLAIN
    said = capsys.readouterr().out
    assert f"skipped {len(JUNK)} images in hidden or system folders, such as " in said
    assert "2 classes: the smallest, cat, has 2 images, the largest, cat, 2" in said


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_sub_folders_of_a_class_belong_to_it(tmp_path, capsys, kind):
    names = [*PLAIN, "cat/augmented/0.jpg", "cat/augmented/deep/0.jpg"]
    found, opened = packed(source_of(tmp_path, kind, names), tmp_path)
    assert {key: label for key, (_, label) in found.items()} == {name: name[:3] for name in names}
    assert opened.class_counts.tolist() == [4, 2]
    assert "2 images lie in sub-folders of their class, such as cat/augmented" in capsys.readouterr().out
    last, opened = packed(tmp_path / source_of(tmp_path, kind, names).name, tmp_path, "--set", "level=last")
    assert opened.class_names == ["augmented", "cat", "deep", "dog"]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_wrapping_folder_is_looked_through_and_named(tmp_path, capsys, kind):
    source = source_of(tmp_path, kind, [f"set/images/{name}" for name in PLAIN])
    found, opened = packed(source, tmp_path)
    assert sorted(found) == PLAIN
    assert opened.class_names == ["cat", "dog"]
    assert "all images are in the folder set/images" in capsys.readouterr().out
    found, opened = packed(source, tmp_path, "--under", "set/images/cat")
    assert sorted(found) == PLAIN[:2]
    assert "warning: all images are in one class, cat" in capsys.readouterr().out
    assert packed(source, tmp_path, "--set", "level=2")[1].class_names == ["images"]


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("parts", [("train", "val"), ("site1", "site2")])
def test_parts_of_a_set_are_no_classes(tmp_path, capsys, kind, parts):
    source = source_of(tmp_path, kind, [f"{part}/{name}" for part in parts for name in PLAIN])
    said = refused(capsys, source, tmp_path)
    assert f"--under {parts[0]}" in said
    assert "cat, dog" in said
    assert packed(source, tmp_path, "--under", parts[1])[1].class_names == ["cat", "dog"]
    found, opened = packed(source, tmp_path, "--set", "level=2")
    assert opened.class_counts.tolist() == [4, 4]
    assert len(found) == 8
    assert packed(source, tmp_path, "--set", "level=1")[1].class_names == list(parts)


def test_find_classes():
    """One folder `images` in each class is no class; levels of different kinds of depth."""
    assert find_classes({"ill/images": 3, "well/images": 2}, "x").of == {"ill/images": "ill", "well/images": "well"}
    assert find_classes({"a/b/c": 1}, "x").of == {"a/b/c": "c"}
    assert find_classes({"animal/cat": 1, "plant/rose": 1}, "x", "2").of == {"animal/cat": "cat", "plant/rose": "rose"}
    for level in ("0", "-1", "first", "", "²"):
        with pytest.raises(UserError, match="level="):
            find_classes({"a": 1, "b": 1}, "x", level)
    with pytest.raises(UserError, match="directly in plant"):
        find_classes({"animal/cat": 1, "plant": 4}, "x", "2")


def test_a_class_without_images_is_named(tmp_path, capsys):
    source = source_of(tmp_path, "folder", [*PLAIN, "one/0.jpg"])
    (source / "horse").mkdir()
    packed(source, tmp_path)
    said = capsys.readouterr().out
    assert "warning: 1 folders hold no images and become no class: horse" in said
    packed(source.parent, tmp_path, "--under", source.name)
    assert "warning: 1 folders hold no images and become no class: horse" in capsys.readouterr().out
    (source / "horse").rmdir()
    packed(source.parent, tmp_path, "--under", source.name)
    assert "become no class" not in capsys.readouterr().out  # the folder itself is none
    assert "3 classes: the smallest, one, has 1 images, the largest, cat, 2" in said
    assert "warning: 1 classes have fewer than 2 images: one" in said


def test_only_junk_is_no_source(tmp_path, capsys):
    assert "only 8 in hidden or system folders" in refused(capsys, source_of(tmp_path, "folder", JUNK), tmp_path)


def test_what_a_listing_says_of_its_classes():
    items = [Item(str(i), Bytes(b""), 1) for i in range(3)]
    assert Listing(items, ("a", "b")).remarks[-1] == "warning: all images are in one class, b"
    vectors = [Item("0", Bytes(b""), (0.0, np.nan))]
    assert Listing(vectors, ("a", "b")).remarks == []


def test_lmdb_keys_are_folders_too(tmp_path, capsys):
    entries = {name: encoded(photo(i)) for i, name in enumerate([*PLAIN, *JUNK[:3], "cat/augmented/0.jpg"])}
    found, opened = packed(write_lmdb(tmp_path / "db", entries), tmp_path)
    assert opened.class_names == ["cat", "dog"]
    assert sorted(found) == sorted([*PLAIN, "cat/augmented/0.jpg"])
    assert "skipped 3 images" in capsys.readouterr().out
    assert lmdb.listing(str(tmp_path / "db"), None, {"level": "last"}).class_names == ("augmented", "cat", "dog")


def test_folders_elsewhere_are_named_by_their_images(tmp_path, capsys):
    source = source_of(tmp_path, "folder", ["set/cat/0.jpg", "set/dog/0.jpg", "@eaDir/deep/0.jpg"])
    (source / "text").mkdir()
    (source / "text" / "of").mkdir()
    (source / "text" / "of" / "0.txt").write_text("")
    said = refused(capsys, source, tmp_path, "--under", "nothing")
    assert "set" in said
    assert "text" not in said
    assert "eaDir" not in said
