"""Splits of X-ray sets, against direct computation on the label files and lists they are drawn from."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from torchxrayvision.datasets import NLMTB_Dataset

from loaders.errors import UserError
from loaders.sources.kinds.xray import source as xray
from loaders.sources.kinds.xray.labels import read_labels
from loaders.sources.kinds.xray.splits import held_out, side_of_split
from tests.support.packing import refused
from tests.support.xray import chexpert_file, mimic_set, pack_of, read_shipped, stand_ins

PUBLISHED = ["--set", "split=published"]


@pytest.fixture(scope="module")
def padchest():
    return read_labels("padchest", Path("."))


# By patient


def test_a_tenth_of_the_patients_is_for_testing():
    patients = read_shipped("nih")["Patient ID"].astype(str)
    test = pd.Series(held_out(patients.to_numpy(object)))
    assert (test.groupby(patients).nunique() == 1).all()  # a patient is on one side
    by_patient = test.groupby(patients).first()
    for patient, chosen in by_patient.head(300).items():
        digest = hashlib.sha256(f"group {patient}".encode()).digest()
        assert chosen == (int.from_bytes(digest[:8], "big") < 2**64 // 10)
    assert abs(by_patient.mean() - 0.1) < 4 * np.sqrt(0.1 * 0.9 / len(by_patient))


def test_the_sides_by_patient_are_disjoint_and_the_same_again(tmp_path):
    raw = chexpert_file(tmp_path / "train.csv", 150)
    stand_ins(tmp_path, raw["file"])
    source, views = f"xray:chexpert:{tmp_path}", ["--set", "views=PA,AP,L"]
    train, test = (pack_of(source, tmp_path, *views, "--under", side) for side in ("train", "test"))
    assert len(train) > len(test) > 0
    assert set(train.groups.tolist()).isdisjoint(test.groups.tolist())
    assert sorted([*train.keys, *test.keys]) == sorted(raw["file"])
    again = pack_of(source, tmp_path, *views, "--under", "test")
    assert list(again.keys) == list(test.keys)
    frontal = pack_of(source, tmp_path, "--under", "test")  # of fewer images: the patients stay where they are
    assert set(frontal.groups.tolist()) <= set(test.groups.tolist())


def test_part_and_holdout_keep_patients_together_too(tmp_path):
    raw = chexpert_file(tmp_path / "train.csv", 60)
    stand_ins(tmp_path, raw["file"])
    sides = [pack_of(f"xray:chexpert:{tmp_path}", tmp_path, "--part", part) for part in ("train", "test")]
    assert set(sides[0].groups.tolist()).isdisjoint(sides[1].groups.tolist())


# As published


def test_padchest_as_published(tmp_path, padchest):
    raw = read_shipped("padchest")
    raw = raw[raw["Projection"].isin(["PA", "AP", "AP_horizontal", "L", "COSTAL"])]
    raw = raw[raw["Labels"].notna() & (raw["PatientBirth"] < 2009) & raw["ImageID"].isin(set(padchest.files))]
    images = raw["ImageID"].tolist()
    np.random.RandomState(42).shuffle(images)
    frontal = padchest.take(np.isin(padchest.views.astype(str), ["PA", "AP", "AP Supine", "L", "COSTAL"]))
    patients = raw.set_index("ImageID")["PatientID"]
    both = set(patients[images[: int(0.9 * len(images))]]) & set(patients[images[int(0.9 * len(images)) :]])
    for side, expected in (("train", images[: int(0.9 * len(images))]), ("test", images[int(0.9 * len(images)) :])):
        chosen, notes = side_of_split("padchest", frontal, tmp_path, "published", side)
        assert set(frontal.files[chosen]) == set(expected) and chosen.sum() == len(expected)
        assert f"{len(both):,} of its" in notes[0] and len(both) > 1000


@pytest.mark.parametrize("name", ["padchest", "padchest-cl"])
def test_padchest_as_published_in_a_pack_warns(tmp_path, capsys, name):
    raw = read_shipped("padchest").head(100)
    raw.to_csv(tmp_path / "rows.csv", index=False)
    stand_ins(tmp_path, raw["ImageID"], "PNG")
    known = raw[raw["PatientBirth"] < 2009]
    images = known["ImageID"].tolist()
    np.random.RandomState(42).shuffle(images)
    options = [*PUBLISHED, "--set", f"labels={tmp_path / 'rows.csv'}", "--under", "test"]
    opened = pack_of(f"xray:{name}:{tmp_path}", tmp_path, *options)
    expected = sorted(images[int(0.9 * len(images)) :])
    assert list(opened.keys) == expected if name == "padchest" else set(opened.keys) < set(expected)
    assert "warning: the published split of PadChest is by image" in capsys.readouterr().out


def test_nih_as_published(tmp_path, capsys):
    raw = read_shipped("nih").head(60)
    raw.to_csv(tmp_path / "rows.csv", index=False)
    stand_ins(tmp_path / "images", raw["Image Index"], "PNG")
    rows = raw[raw["View Position"] == "PA"]["Image Index"].tolist()
    options = ["--set", f"labels={tmp_path / 'rows.csv'}", "--set", "views=PA", *PUBLISHED, "--under"]
    assert "train_val_list.txt" in refused(capsys, f"xray:nih:{tmp_path}", tmp_path, *options, "train")
    (tmp_path / "train_val_list.txt").write_text("\r\n".join(raw["Image Index"][:45]))
    (tmp_path / "test_list.txt").write_text("\n".join([*raw["Image Index"][45:], "00099999_000.png"]) + "\n")
    for side, images in (("train", raw["Image Index"][:45]), ("test", raw["Image Index"][45:])):
        opened = pack_of(f"xray:nih:{tmp_path}", tmp_path, *options, side)
        assert list(opened.keys) == sorted(f"images/{image}" for image in set(images) & set(rows))


def test_chexpert_as_published(tmp_path, capsys):
    stand_ins(tmp_path, chexpert_file(tmp_path / "train.csv", 30)["file"])
    source, options = f"xray:chexpert:{tmp_path}", ["--set", "views=PA,AP,L", *PUBLISHED, "--under"]
    assert "valid.csv" in refused(capsys, source, tmp_path, *options, "valid")
    valid = chexpert_file(tmp_path / "valid.csv", 12, "valid")
    stand_ins(tmp_path, valid["file"])
    assert len(pack_of(source, tmp_path, *options, "train")) == 30
    assert list(pack_of(source, tmp_path, *options, "valid").keys) == sorted(valid["file"])
    said = refused(capsys, source, tmp_path, *options, "valid", "--set", f"labels={tmp_path / 'valid.csv'}")
    assert "leave --set labels away" in said


def test_mimic_as_published(tmp_path):
    images = mimic_set(tmp_path)
    there = images[images["ViewPosition"].isin(["PA", "LATERAL"])]
    for side in ("train", "validate", "test"):
        options = ["--set", "views=PA,LATERAL", *PUBLISHED, "--under", side]
        opened = pack_of(f"xray:mimic:{tmp_path}", tmp_path, *options)
        assert list(opened.keys) == sorted(there["file"][there["split"] == side])


# Tuberculosis and COVIDx


def write_tuberculosis(root, shenzhen, montgomery, place="MontgomerySet"):
    """Empty files with the names of the two sets, of both classes."""
    for folder, prefix, count in (("ChinaSet_AllFiles", "CHN", shenzhen), (place, "MCU", montgomery)):
        (root / folder / "CXR_png").mkdir(parents=True)
        for k in range(1, count + 1):
            (root / folder / f"CXR_png/{prefix}CXR_{k:04d}_{int(k * 2 > count)}.png").touch()
        (root / folder / "CXR_png/Thumbs.db").touch()


@pytest.mark.parametrize("place", ["MontgomerySet", "NLM-MontgomeryCXRSet/MontgomerySet"])
def test_tuberculosis_as_published(tmp_path, place):
    write_tuberculosis(tmp_path, 662, 138, place)
    sides = {side: xray.listing(f"xray:tuberculosis:{tmp_path}", side) for side in ("train", "test")}
    expected = {"train": {}, "test": {}}
    for name, folder, train in (("Shenzhen", "ChinaSet_AllFiles", 562), ("Montgomery", place, 117)):
        theirs = NLMTB_Dataset(str(tmp_path / folder))
        label = dict(zip(theirs.csv["fname"], theirs.labels[:, 0].tolist(), strict=True))
        files = sorted(label)
        np.random.RandomState(42).shuffle(files)
        for side, chosen in (("train", files[: int(0.85 * len(files))]), ("test", files[int(0.85 * len(files)) :])):
            assert len(chosen) == (train if side == "train" else len(files) - train)
            expected[side] |= {f"{name}/{file}": label[file] for file in chosen}
    for side, listing in sides.items():
        assert {item.key: item.label for item in listing.items} == expected[side]
        assert listing.class_names == ("normal", "tuberculosis") and not listing.notes
        assert all(Path(item.reader.path).is_file() for item in listing.items)
    assert len(xray.listing(f"xray:tuberculosis:{tmp_path}").items) == 800


def test_one_set_of_tuberculosis_in_a_pack(tmp_path, capsys):
    files = [f"CXR_png/MCUCXR_{k:04d}_{k % 2}.png" for k in range(20)]
    written = stand_ins(tmp_path / "set", files, "PNG")
    opened = pack_of(f"xray:tuberculosis:{tmp_path / 'set'}", tmp_path)
    assert list(opened.keys) == [file.replace("CXR_png", "Montgomery") for file in files]
    assert opened.labels.tolist() == [k % 2 for k in range(20)]
    assert [opened.record(i).tobytes() for i in range(20)] == list(written.values())
    said = capsys.readouterr().out
    assert "no images of Shenzhen" in said and "20 images here, 138 as published" in said
    (tmp_path / "set/CXR_png/MCUCXR_0099_7.png").touch()
    assert "MCUCXR_0099_7.png" in refused(capsys, f"xray:tuberculosis:{tmp_path / 'set'}", tmp_path)


@pytest.mark.parametrize("labels", [["negative", "positive"], ["COVID-19", "normal", "pneumonia"]])
def test_covidx_in_a_pack(tmp_path, capsys, labels):
    expected = {}
    for side, count in (("train", 14), ("test", 5)):
        rows = []
        for k in range(count):
            name, label = f"a {k}.png" if k == 3 else f"{side}-{k}.png", labels[k % len(labels)]
            rows.append(f"{'MIDRC-' if k % 2 else ''}{k // 4} {name} {label} ricord\n")
            expected[f"{side}/{name}"] = label
        stand_ins(tmp_path, [key for key in expected if key.startswith(side)], "PNG")
        (tmp_path / f"{side}.txt").write_text("".join(rows))
    source = f"xray:covidx:{tmp_path}"
    for side in ("train", "test", None):
        opened = pack_of(source, tmp_path, *(["--under", side] if side else []))
        found = [opened.class_names[label] for label in opened.labels]
        keys = sorted(key for key in expected if side is None or key.startswith(side))
        assert dict(zip(opened.keys, found, strict=True)) == {key: expected[key] for key in keys}
        assert list(opened.class_names) == labels
        groups = dict(zip(opened.keys, opened.groups.tolist(), strict=True))
        if side != "test":
            assert groups["train/train-4.png"] == 1 and groups["train/train-5.png"] == groups["train/train-7.png"] != 1
    (tmp_path / "train/train-1.png").unlink()
    assert "lacks 1 of 14 images of covidx: train/train-1.png" in refused(capsys, source, tmp_path, "--under", "train")
    assert len(pack_of(source, tmp_path, "--set", "missing=skip")) == 18
    (tmp_path / "test.txt").write_text("1 x.png\n")
    assert "test.txt, line 1" in refused(capsys, source, tmp_path)


def test_patients_and_paths_of_covidx_may_have_spaces(tmp_path):
    """Lines as version 8 has them in COVID-Net's labels/train_COVIDx8B.txt, and one whose path has spaces."""
    rows = [
        ("COVID 1", "COVID(1).png", "positive", "sirm"),
        ("COVID 100", "COVID(100).png", "positive", "sirm"),
        ("SITE2-000265", "MIDRC-RICORD-1C-SITE2-000265-99793-1.png", "positive", "ricord"),
        ("7", "an image of 7.png", "negative", "rsna"),
        ("COVID 1", "COVID(2).png", "positive", "sirm"),
    ]
    for side in ("train", "test"):
        (tmp_path / f"{side}.txt").write_text("".join(" ".join(row) + "\n" for row in rows))
        stand_ins(tmp_path, [f"{side}/{row[1]}" for row in rows], "PNG")
    listing = xray.listing(f"xray:covidx:{tmp_path}", "train")
    expected = {f"train/{file}": (label, patient) for patient, file, label, _ in rows}
    assert {item.key: listing.class_names[item.label] for item in listing.items} == {
        key: label for key, (label, _) in expected.items()
    }
    groups = {item.key: item.group for item in listing.items}
    assert groups["train/COVID(1).png"] == groups["train/COVID(2).png"] != groups["train/COVID(100).png"]
    assert groups["train/an image of 7.png"] == 7
    (tmp_path / "train/COVID(1).png").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 5 images of covidx: train/COVID\(1\)\.png"):
        xray.listing(f"xray:covidx:{tmp_path}", "train")
