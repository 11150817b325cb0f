"""Images without labels, and tables with labels of which not all are known."""

import shutil

import numpy as np
import pandas as pd
import pytest

from loaders.errors import UserError
from loaders.packs import agree
from loaders.packs.shard import Pack
from tests.support.packing import refused, run
from tests.support.pictures import encoded, folder, photo, tar_of


def opened(source, tmp_path, *options):
    assert run(source, tmp_path / "out.h5", "--workers", "0", "--force", *options) == 0
    found = Pack.open(tmp_path / "out.h5")
    assert found.verify() == []
    return found


def keyed(pack):
    return {key: pack.record(i).tobytes() for i, key in enumerate(pack.keys)}


def nested(root):
    """Images directly in the folder and in folders of any depth; {key: bytes}."""
    files = folder(root / "images", classes=("train", "2024/ward b"))
    shutil.copy(root / "images" / "train" / "0.jpg", root / "images" / "x.jpg")
    return files | {"x.jpg": files["train/0.jpg"]}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_any_folders_are_taken_without_labels(tmp_path, capsys, kind):
    files = nested(tmp_path)
    source = tmp_path / "images"
    if kind == "tar":
        source = tmp_path / "images.tar"
        tar_of(source, files)
    assert "--set labels=none" in refused(capsys, source, tmp_path)
    pack = opened(source, tmp_path, "--set", "labels=none")
    assert keyed(pack) == files
    assert (pack.class_names, set(pack.labels.tolist()), pack.labels.dtype) == ([], {-1}, np.int64)
    assert "9 images have no label" in capsys.readouterr().out
    assert "no value of --set labels 'maybe'" in refused(capsys, source, tmp_path, "--set", "labels=maybe")


@pytest.mark.parametrize("kind", ["image", "pattern", "list"])
def test_files_are_named_one_by_one(tmp_path, capsys, kind):
    files = nested(tmp_path)
    expected = {"image": {"x.jpg"}, "pattern": {"0.jpg", "2.jpg"}, "list": {"images/x.jpg", "images/train/1.png"}}[kind]
    source = {"image": "images/x.jpg", "pattern": "images/train/*.jpg", "list": "list.txt"}[kind]
    (tmp_path / "list.txt").write_text("\ufeffimages/x.jpg\r\n\r\n  images/train/1.png\n")
    pack = opened(tmp_path / source, tmp_path)
    assert set(pack.keys) == expected and set(pack.labels.tolist()) == {-1}
    below = {"image": "", "pattern": "train/", "list": ""}[kind]
    assert keyed(pack) == {key: files[below + key.removeprefix("images/")] for key in expected}
    assert "--under cannot" in refused(capsys, tmp_path / source, tmp_path, "--under", "train")


def test_a_list_of_nothing_and_of_absent_files(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("\n\n")
    assert "names no images" in refused(capsys, tmp_path / "list.txt", tmp_path)
    (tmp_path / "list.txt").write_text("none.png\n")
    assert "none.png" in refused(capsys, tmp_path / "list.txt", tmp_path)


def images(tmp_path, count):
    for i in range(count):
        (tmp_path / f"{i}.png").write_bytes(encoded(photo(i), "PNG"))


@pytest.mark.parametrize(
    ("labels", "known"), [("cat,,dog,-1,cat", [0, -1, 1, -1, 0]), ("2,nan,0,,2", [2, -1, 0, -1, 2])]
)
def test_rows_without_a_label_are_kept_without(tmp_path, capsys, labels, known):
    images(tmp_path, 5)
    text = "".join(f"{i}.png,{label}\n" for i, label in enumerate(labels.split(",")))
    (tmp_path / "t.csv").write_text(f"path,label\n{text}")
    pack = opened(tmp_path / "t.csv", tmp_path, "--set", "unlabelled=keep")
    assert pack.labels.tolist() == known
    assert pack.class_counts.sum() == 3
    assert "2 rows without a label are taken without, such as 1.png" in (said := capsys.readouterr().out)
    assert "2 images have no label" in said
    for open_ in (agree.open_train, lambda path: agree.open_test(path, pack)):
        with pytest.raises(UserError, match=r"2 images without a label, such as 1\.png"):
            open_(tmp_path / "out.h5")
    named = opened(tmp_path / "t.csv", tmp_path, "--set", "unlabelled=keep", "--classes", pack.class_names[-1])
    assert named.labels.tolist() == [0] * known.count(max(known))


def test_a_table_without_any_label(tmp_path, capsys):
    images(tmp_path, 3)
    (tmp_path / "t.csv").write_text("path,patient\n0.png,b\n1.png,\n2.png,b\n")
    assert "labels=none" in refused(capsys, tmp_path / "t.csv", tmp_path)
    pack = opened(tmp_path / "t.csv", tmp_path, "--set", "labels=none")
    assert (pack.class_names, pack.labels.tolist(), pack.groups.tolist()) == ([], [-1] * 3, [0, -1, 0])
    (tmp_path / "t.csv").write_text("path,label\n0.png,\n1.png,\n")
    assert opened(tmp_path / "t.csv", tmp_path, "--set", "unlabelled=keep").labels.tolist() == [-1, -1]


@pytest.mark.parametrize("named", ["by a setting", "by their names"])
def test_a_table_of_several_labels_at_once(tmp_path, capsys, named):
    """Beside groups, parts, and columns for subgroups, which packs do not have."""
    images(tmp_path, 6)
    before = "label:" if named == "by their names" else ""
    frame = pd.DataFrame({
        "image": [f"{i}.png" for i in range(6)], "sex": list("fmfmfm"), "age": range(6),
        f"{before}edema": ["1", "0", "", "-1", "1.0", "nan"], "patient": list("aabbc") + [None],
        f"{before}no finding": [0, 1, 1, 0, 0, 1], "split": ["train", "test"] * 3,
    })  # fmt: skip
    frame.to_csv(tmp_path / "t.csv", index=False)
    choice = [] if before else ["--set", "labels=no finding, edema"]
    pack = opened(tmp_path / "t.csv", tmp_path, *choice)
    edema, finding = [1, 0, np.nan, np.nan, 1, np.nan], [0, 1, 1, 0, 0, 1]
    columns = dict(zip(pack.class_names, pack.labels.T, strict=True))
    assert pack.class_names == (["edema", "no finding"] if before else ["no finding", "edema"])
    np.testing.assert_array_equal(columns["edema"], edema)
    np.testing.assert_array_equal(columns["no finding"], finding)
    assert pack.groups.tolist() == [0, 0, 1, 1, 2, -1]
    assert "edema (2 of 3)" in capsys.readouterr().out
    assert list(opened(tmp_path / "t.csv", tmp_path, *choice, "--under", "test").keys) == ["1.png", "3.png", "5.png"]


@pytest.mark.parametrize(
    ("text", "choice", "said"),
    [("path,a,b\nx.png,1,2\n", "labels=a,b", "line 2, column b: '2' is no label; expected 1, 0"),
     ("path,a,b\nx.png,1,yes\n", "labels=a,b", "line 2, column b: 'yes' is no label"),
     ("path,a,b\nx.png,0.5,1\n", "labels=a", "line 2, column a: '0.5' is no label"),
     ("path,edema\nx.png,0\n", "labels=oedema", "no column 'oedema'; did you mean 'edema'?"),
     ("path,a\nx.png,0\n", "labels=a,a", "names 'a' twice"),
     ("path,a\n", "labels=a", "no rows")],
)  # fmt: skip
def test_labels_that_are_none_are_named_with_line_and_column(tmp_path, capsys, text, choice, said):
    images(tmp_path, 1)
    (tmp_path / "t.csv").write_text(text)
    assert said in refused(capsys, tmp_path / "t.csv", tmp_path, "--set", choice)


def test_unlabelled_images_are_split_and_joined(tmp_path):
    images(tmp_path, 20)
    part = [opened(tmp_path / "[0-9]*.png", tmp_path, "--part", name) for name in ("train", "test")]
    assert [len(pack) for pack in part] == [16, 4]
