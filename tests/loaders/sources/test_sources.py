"""Each kind of source, made by, or read against, a program that is not ours where there is one."""

import io
import os

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from tests.support.packing import packed, refused
from tests.support.pictures import encoded, photo, tar_of

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
    for part, parts in {"train": ["train"], "trainval": ["train", "val"], "test": ["test"],
                        "published-train": ["test"], "published-test": ["train", "val"]}.items():  # fmt: skip
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


@pytest.mark.parametrize(
    ("labels", "train", "said"),
    [([1, 2, 1], [], "no image of train"), ([1, 2, 1], [0], "0 to 0"), ([1, 2, 1], [4], "4 to 4"),
     ([0, 2, 1], [1], "-1 is no class number"), ("abc", [1], "it has no 'labels'")],
)  # fmt: skip
def test_flowers_whose_lists_do_not_fit(tmp_path, capsys, labels, train, said):
    root = tmp_path / "flowers"
    (root / "jpg").mkdir(parents=True)
    savemat(root / "imagelabels.mat", {"labels": labels})
    savemat(root / "setid.mat", {"trnid": np.array(train, dtype=np.uint16), "valid": [2], "tstid": [3]})
    assert said in refused(capsys, root, tmp_path, "--under", "train")


@pytest.mark.parametrize("name", ["imagelabels.mat", "setid.mat"])
def test_flowers_whose_lists_are_damaged(tmp_path, capsys, name):
    """Compressed, as the real ones are; what is raised over such files varies."""
    root = tmp_path / "flowers"
    (root / "jpg").mkdir(parents=True)
    numbers = np.random.RandomState(0).randint(1, 100, 2000)
    savemat(root / "imagelabels.mat", {"labels": numbers}, do_compression=True)
    savemat(root / "setid.mat", {"trnid": numbers, "valid": numbers, "tstid": numbers}, do_compression=True)
    whole = (root / name).read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 8]) + whole[middle + 1 :]
    for content in (flipped, whole[:middle], whole[:130], whole[:60], b""):
        (root / name).write_bytes(content)
        assert "setid.mat is damaged" in refused(capsys, root, tmp_path, "--under", "train")


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


@pytest.mark.parametrize(
    "labels", [[f"{k}.0" for k in range(12)], ["0", "1", "2.00", "+3", "4e0", " 5", "06", *map(str, range(7, 12))]]
)
def test_csv_of_numbers_of_any_spelling(tmp_path, labels):
    """pandas writes 0.0 … 11.0 where one label was missing."""
    for i in range(12):
        (tmp_path / f"{i:02d}.png").write_bytes(encoded(photo(i), "PNG"))
    (tmp_path / "t.csv").write_text("file,class\n" + "".join(f"{i:02d}.png,{labels[i]}\n" for i in range(12)))
    _, opened = packed(tmp_path / "t.csv", tmp_path)
    assert opened.labels.tolist() == list(range(12))
    assert opened.class_names == [str(k) for k in range(12)]


@pytest.mark.parametrize("missing", ["", "nan", "NaN", "<NA>", "-1", "-1.0", "null"])
@pytest.mark.parametrize("known", [("0", "3"), ("cat", "dog")])
def test_rows_without_a_label(tmp_path, capsys, missing, known):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(photo(i), "PNG"))
    (tmp_path / "t.csv").write_text(f"file,class\n0.png,{known[1]}\n1.png,{missing}\n2.png,{known[0]}\n")
    assert "line 3: the label is" in refused(capsys, tmp_path / "t.csv", tmp_path)
    found, opened = packed(tmp_path / "t.csv", tmp_path, "--set", "unlabelled=skip")
    assert {key: name for key, (_, name) in found.items()} == {"0.png": known[1], "2.png": known[0]}
    assert "1 rows without a label are left out, such as 1.png" in capsys.readouterr().out
    found, opened = packed(tmp_path / "t.csv", tmp_path, "--set", "unlabelled=unknown")
    assert {key: name for key, (_, name) in found.items()} == {"0.png": known[1], "1.png": "unknown", "2.png": known[0]}
    assert opened.class_names[-1] == "unknown"
    assert "there are: error" in refused(capsys, tmp_path / "t.csv", tmp_path, "--set", "unlabelled=no")


@pytest.mark.parametrize(
    ("labels", "said"),
    [("0,1,none", "'none' is missing"), ("0,1,?", "missing"), ("0,1,2.5", "no whole number"),
     ("0,1,1 2", "list of numbers"),
     ("0,1,inf", ""), ("0,1,1e400", "no whole number")],
)  # fmt: skip
def test_labels_that_are_none(tmp_path, capsys, labels, said):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(photo(i), "PNG"))
    (tmp_path / "t.csv").write_text("file,class\n" + "".join(f"{i}.png,{x}\n" for i, x in enumerate(labels.split(","))))
    if said:
        assert said in refused(capsys, tmp_path / "t.csv", tmp_path)
    else:
        assert packed(tmp_path / "t.csv", tmp_path)[1].class_names == labels.split(",")


def test_names_stay_as_typed(tmp_path):
    """A number among names is a name, with its zeros."""
    members = {}
    for i, label in enumerate(["007", "cat", "1.0"]):
        members |= {f"{i}.jpg": encoded(photo(i)), f"{i}.cls": label.encode()}
    tar_of(tmp_path / "t.tar", members)
    assert packed(tmp_path / "t.tar", tmp_path)[1].class_names == ["007", "1.0", "cat"]


@pytest.mark.parametrize(
    ("name", "text", "label"),
    [("cls", "2.0", 2), ("cls", " 02\n", 2), ("json", '{"label": 2.0}', 2), ("json", '{"cls": "2"}', 2),
     ("cls", "-1", None), ("cls", "\x02", None), ("cls", "1 2", None), ("cls", "[2]", None), ("cls", "", None),
     ("json", '{"label": true}', None), ("json", '{"label": [2]}', None), ("json", '{"label": NaN}', None),
     ("json", '{"label": null}', None), ("json", "2", None), ("json", '{"label": 2.5}', None)],
)  # fmt: skip
def test_webdataset_labels_of_any_type(tmp_path, capsys, name, text, label):
    members = {"a.jpg": encoded(photo(1)), f"a.{name}": text.encode()}
    tar_of(tmp_path / "t.tar", members)
    if label is None:
        assert f"a.{name} holds no label that can be used: " in refused(capsys, tmp_path / "t.tar", tmp_path)
    else:
        assert packed(tmp_path / "t.tar", tmp_path)[1].class_names[-1] == str(label)


def test_a_number_that_is_no_class_is_refused(tmp_path, capsys):
    """Every class up to the greatest number gets a name: 10^12 of them would fill the memory."""
    (tmp_path / "x.png").write_bytes(encoded(photo(0), "PNG"))
    (tmp_path / "t.csv").write_text("path,label\nx.png,1000000000000\n")
    assert "1000000000000 is no class number" in refused(capsys, tmp_path / "t.csv", tmp_path)
    for label in ("1000000000000", "-1"):
        members = {"a.jpg": encoded(photo(1)), "a.json": f'{{"cls": {label}}}'.encode()}
        tar_of(tmp_path / "t.tar", members)
        assert f"{label} is no class number" in refused(capsys, tmp_path / "t.tar", tmp_path)
