"""X-ray sources: labels against the label files themselves, and the whole way to a pack with stand-ins for images."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from loaders.sources.kinds.xray.labels import patient_numbers, read_labels
from tests.support.packing import refused, run
from tests.support.pictures import encoded, gray16
from tests.support.xray import SHIPPED, chexpert_file, mimic_set, pack_of, read_shipped, stand_ins

FINDINGS = [
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
]  # fmt: skip
COLUMNS = "Image Index,Finding Labels,Patient ID,Patient Age,View Position"
PADCHEST_WORDS = {
    "Air Trapping": "air trapping", "Aortic Atheromatosis": "aortic atheromatosis", "Mass": "mass", "Nodule": "nodule",
    "Aortic Elongation": "aortic elongation", "Atelectasis": "atelectasis", "Bronchiectasis": "bronchiectasis",
    "Cardiomegaly": "cardiomegaly", "Consolidation": "consolidation|air bronchogram", "Edema": "edema",
    "Costophrenic Angle Blunting": "costophrenic angle blunting", "Effusion": "effusion", "Emphysema": "emphysema",
    "Fibrosis": "fibrosis", "Flattened Diaphragm": "flattened diaphragm", "Fracture": "fracture", "Hernia": "hernia",
    "Granuloma": "granuloma", "Hemidiaphragm Elevation": "hemidiaphragm elevation", "Scoliosis": "scoliosis",
    "Hilar Enlargement": "hilar enlargement|adenopathy|pulmonary artery enlargement", "Pneumonia": "pneumonia",
    "Infiltration": "infiltration|infiltrates|interstitial pattern|ground glass pattern|reticular interstitial pattern|"
                    "reticulonodular interstitial pattern|alveolar pattern|consolidation|air bronchogram",
    "Pleural_Thickening": "pleural thickening", "Pneumothorax": "pneumothorax", "Tuberculosis": "tuberculosis",
    "Support Devices": "support devices|device|pacemaker",
}  # fmt: skip


# Whole label files, against pandas on the file itself


def test_nih_labels(tmp_path):
    raw = read_shipped("nih")
    labels = read_labels("nih", tmp_path)
    assert len(labels) == 112_120 and labels.values.dtype == np.float32  # the published number of images,
    assert len(set(labels.patients)) == 30_805  # and of patients
    expected = raw["Finding Labels"].str.get_dummies("|").drop(columns="No Finding")
    assert labels.names == tuple(sorted(expected.columns)) and len(labels.names) == 14
    np.testing.assert_array_equal(labels.values, expected[list(labels.names)].to_numpy(np.float32))
    assert labels.files.tolist() == raw["Image Index"].tolist()
    assert labels.views.tolist() == raw["View Position"].tolist()
    assert patient_numbers(labels.patients).tolist() == raw["Patient ID"].tolist()


def test_chexpert_labels(tmp_path):
    raw = read_shipped("chexpert")
    labels = read_labels("chexpert", tmp_path)
    assert labels.files.tolist() == raw["Path"].str.removeprefix("CheXpert-v1.0-small/").tolist()
    assert len(labels.names) == 13 and "Effusion" in labels.names
    healthy = raw["No Finding"] == 1
    for finding in FINDINGS:
        column = labels.values[:, labels.names.index(finding.replace("Pleural Effusion", "Effusion"))]
        cleared = healthy if finding != "Support Devices" else healthy & False
        assert np.sum(column == 1) == ((raw[finding] == 1) & ~cleared).sum()
        assert np.sum(np.isnan(column)) == ((raw[finding].isna() | (raw[finding] == -1)) & ~cleared).sum()
    views = pd.Series(labels.views).value_counts()
    assert views["L"] == (raw["Frontal/Lateral"] == "Lateral").sum()
    assert views[["PA", "AP"]].tolist() == [(raw["AP/PA"] == view).sum() for view in ("PA", "AP")]
    assert patient_numbers(labels.patients).tolist() == raw["Path"].str.split("/").str[2].str[7:].astype(int).tolist()


def test_no_finding_may_clear_devices_too(tmp_path):
    """As the published code has it: the facts count the known positives of frontal rows that it overwrites."""
    raw = read_shipped("chexpert")
    plain, cleared = (read_labels("chexpert", tmp_path, clear_devices=clear) for clear in (False, True))
    healthy, device = (raw["No Finding"] == 1).to_numpy(), raw["Support Devices"].to_numpy()
    at = cleared.names.index("Support Devices")
    frontal = np.isin(cleared.views, ("PA", "AP"))
    assert ((plain.values[:, at] == 1) & (cleared.values[:, at] == 0) & frontal).sum() == 7_420
    known = np.where(device == -1, np.nan, device)
    np.testing.assert_array_equal(cleared.values[:, at], np.where(healthy, 0, known).astype(np.float32))
    others = [k for k in range(13) if k != at]
    np.testing.assert_array_equal(plain.values[:, others], cleared.values[:, others])


def test_padchest_labels(tmp_path):
    raw = read_shipped("padchest")
    labels = read_labels("padchest", tmp_path)
    usable = raw[raw["Labels"].notna() & (raw["PatientBirth"] < 2009)]
    assert len(usable) - len(labels) == 21  # files that torchxrayvision knows to be broken
    there = usable[usable["ImageID"].isin(set(labels.files))]
    assert labels.files.tolist() == there["ImageID"].tolist()  # in the file's order
    assert labels.names == tuple(sorted(PADCHEST_WORDS)) and len(labels.names) == 27
    texts = there["Labels"].unique()
    for name, words in PADCHEST_WORDS.items():
        positive = {text for text in texts if any(word in text for word in words.split("|"))}
        assert labels.values[:, labels.names.index(name)].sum() == there["Labels"].isin(positive).sum(), name
    assert labels.patients.tolist() == there["PatientID"].astype(str).tolist()
    views = there["Projection"].replace("AP_horizontal", "AP Supine")
    assert labels.views.tolist() == views.tolist()
    groups = patient_numbers(labels.patients)
    assert (groups >= 0).all() and len(set(groups.tolist())) == there["PatientID"].nunique()


def test_reading_labels_leaves_the_random_state_alone(tmp_path):
    np.random.seed(7)
    expected = np.random.random()
    np.random.seed(7)
    read_labels("nih", tmp_path)
    assert np.random.random() == expected


def test_the_other_sources_need_no_torchxrayvision():
    code = "import sys; from loaders.packing.find import kinds; kinds();"
    code += " print(*{'torchxrayvision', 'pandas'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[4], capture_output=True, check=True)
    assert done.stdout.split() == []


# The whole way, with stand-ins for images


@pytest.mark.parametrize("layout", ["images", "images_{:03d}/images", "."])
def test_nih_in_a_pack(tmp_path, layout):
    raw = read_shipped("nih").head(40)
    raw.to_csv(tmp_path / "rows.csv", index=False)
    root = tmp_path / "nih"
    keys = [Path(layout.format(k % 3 + 1), image).as_posix() for k, image in enumerate(raw["Image Index"])]
    files = stand_ins(root, keys, "PNG")
    opened = pack_of(f"xray:nih:{root}", tmp_path, "--set", f"labels={tmp_path / 'rows.csv'}")
    assert list(opened.keys) == sorted(keys)
    assert all(opened.record(i).tobytes() == files[key] for i, key in enumerate(opened.keys))
    row = raw.set_index(pd.Index(keys)).loc[list(opened.keys)]
    assert opened.labels.dtype == np.float32 and opened.labels.shape == (40, 14)
    for k, name in enumerate(opened.class_names):
        assert opened.labels[:, k].tolist() == [float(name in text.split("|")) for text in row["Finding Labels"]]
    assert opened.groups.tolist() == row["Patient ID"].tolist()
    some = pack_of(f"xray:nih:{root}", tmp_path, "--set", f"labels={tmp_path / 'rows.csv'}", "--set", "views = PA")
    assert list(some.keys) == sorted(key for key, view in zip(keys, raw["View Position"], strict=True) if view == "PA")
    assert json.loads(some.attributes["selection"])["settings"]["views"] == "PA"
    assert some.attributes["plan"] != opened.attributes["plan"]


def test_only_the_first_image_of_each_patient(tmp_path):
    """With that image's own labels: torchxrayvision's unique_patients mixes those of several."""
    raw = chexpert_file(tmp_path / "train.csv", 60)
    stand_ins(tmp_path, raw["file"])
    opened = pack_of(f"xray:chexpert:{tmp_path}", tmp_path, "--set", "unique_patients=true", "--set", "views=AP,PA,L")
    first = raw.groupby("patient").head(1).sort_values("file")
    assert list(opened.keys) == first["file"].tolist() and len(first) < len(raw)
    pneumonia = first["Pneumonia"].mask(first["Pneumonia"] == -1).mask(first["No Finding"] == 1, 0)
    np.testing.assert_array_equal(opened.labels[:, list(opened.class_names).index("Pneumonia")], pneumonia)


@pytest.mark.parametrize("place", ["train.csv", "valid.csv", "mine.csv.gz", "trainee/valid-rows.csv"])
@pytest.mark.parametrize("side", ["train", "valid"])
def test_chexpert_whatever_its_label_file_is_called(tmp_path, place, side):
    """CheX_Dataset looks into the name for what the rows' paths begin with."""
    (tmp_path / "trainee").mkdir()
    raw = chexpert_file(tmp_path / place, 30, side)
    labels = read_labels("chexpert", tmp_path, tmp_path / place)
    assert labels.files.tolist() == raw["file"].tolist()
    assert patient_numbers(labels.patients).tolist() == raw["patient"].astype(int).tolist()


@pytest.mark.parametrize("layout", [".", "{}", "images", "images/{}"])
def test_padchest_keeps_16_bits(tmp_path, layout):
    raw = read_shipped("padchest").head(30)
    raw.to_csv(tmp_path / "rows.csv", index=False)
    root = tmp_path / "padchest"
    keys = [Path(layout.format(k % 3), image).as_posix() for k, image in enumerate(raw["ImageID"])]
    for k, key in enumerate(keys):
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(encoded(Image.fromarray(gray16(k, 12, 10)), "PNG"))
    opened = pack_of(f"xray:padchest:{root}", tmp_path, "--set", f"labels={tmp_path / 'rows.csv'}")
    usable = (raw["PatientBirth"] < 2009).tolist()
    assert list(opened.keys) == sorted(key for key, adult in zip(keys, usable, strict=True) if adult)
    assert opened.labels.shape[1] == 27
    assert opened.attributes["bits"] == 16
    assert all(opened.record(i).tobytes() == (root / key).read_bytes() for i, key in enumerate(opened.keys))


def test_padchest_cl_has_the_images_of_one_label(tmp_path):
    raw = read_shipped("padchest").head(300)
    raw.to_csv(tmp_path / "rows.csv", index=False)
    stand_ins(tmp_path / "images", raw["ImageID"], "PNG")
    opened = pack_of(f"xray:padchest-cl:{tmp_path}", tmp_path, "--set", f"labels={tmp_path / 'rows.csv'}")
    expected = {}
    for image, text, birth in zip(raw["ImageID"], raw["Labels"].fillna(""), raw["PatientBirth"], strict=True):
        found = [name for name, words in PADCHEST_WORDS.items() if any(word in text for word in words.split("|"))]
        if len(found) == 1 and birth < 2009:
            expected[f"images/{image}"] = found[0]
    labels = [opened.class_names[label] for label in opened.labels]
    assert dict(zip(opened.keys, labels, strict=True)) == expected and len(expected) > 50
    assert list(opened.class_names) == sorted(PADCHEST_WORDS)  # also those that no image has


@pytest.mark.parametrize("packed_with", ["", ".gz"])
def test_mimic_in_a_pack(tmp_path, packed_with):
    images = mimic_set(tmp_path, packed_with)
    frontal = images[images["ViewPosition"].isin(["PA", "AP"])].sort_values("file")
    opened = pack_of(f"xray:mimic:{tmp_path}", tmp_path)
    assert list(opened.keys) == frontal["file"].tolist()
    assert len(opened.class_names) == 13
    assert opened.groups.tolist() == frontal["subject_id"].tolist()
    for finding in FINDINGS:
        expected = frontal[finding].mask(frontal[finding] == -1).mask(frontal["No Finding"] == 1, 0)
        column = list(opened.class_names).index(finding.replace("Pleural Effusion", "Effusion"))
        np.testing.assert_array_equal(opened.labels[:, column], expected)
    cleared = pack_of(f"xray:mimic:{tmp_path}", tmp_path, "--set", "no_finding=all")
    device = frontal["Support Devices"].mask(frontal["Support Devices"] == -1).mask(frontal["No Finding"] == 1, 0)
    np.testing.assert_array_equal(cleared.labels[:, list(cleared.class_names).index("Support Devices")], device)


# Missing images


def test_missing_images_are_counted_and_named_or_skipped(tmp_path, capsys):
    raw = chexpert_file(tmp_path / "train.csv", 20)
    stand_ins(tmp_path, raw["file"])
    for file in raw["file"][3:6]:
        (tmp_path / file).unlink()
    said = refused(capsys, f"xray:chexpert:{tmp_path}", tmp_path, "--set", "views=PA,AP,L")
    assert f"lacks 3 of 20 images of chexpert: {raw['file'][3]}" in said and "missing=skip" in said
    opened = pack_of(f"xray:chexpert:{tmp_path}", tmp_path, "--set", "views=PA,AP,L", "--set", "missing=skip")
    assert len(opened) == 17
    assert "3 of 20 images are missing and left out" in capsys.readouterr().out


# Bad input


def test_help_explains_the_settings(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    said = capsys.readouterr().out
    assert "settings of xray" in said and "unique_patients" in said and "xray:NAME:FOLDER" in said


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [("xray:nih", [], "expected xray:NAME:FOLDER"), ("xray:nih:", [], "expected xray:NAME:FOLDER"),
     ("xray:padchst:{}", [], "did you mean 'padchest'?"), ("xray:nih:{}/absent", [], "there is no folder"),
     ("xray:nih:{}", [], "looked for images/00000001_000.png, images_*/images/00000001_000.png, 00000001_000.png"),
     ("xray:chexpert:{}", [], "looked for train/patient00001/study1/view1_frontal.jpg"),
     ("xray:mimic:{}", [], "lacks mimic-cxr-2.0.0-chexpert.csv"),
     ("xray:tuberculosis:{}", [], "ChinaSet_AllFiles/CXR_png"), ("xray:covidx:{}", [], "train.txt"),
     ("xray:nih:{}", ["--set", "view=PA"], "did you mean 'views'? there are: views, unique_patients"),
     ("xray:nih:{}", ["--set", "views"], "expected KEY=VALUE"), ("xray:nih:{}", ["--set", "views="], "names no view"),
     ("xray:nih:{}", ["--set", "split=patients", "--set", "split=published"], "split twice"),
     ("xray:nih:{}", ["--set", "split=patient"], "did you mean 'patients'? there are: patients, published"),
     ("xray:nih:{}", ["--set", "unique_patients=yes"], "there are: false, true"),
     ("xray:nih:{}", ["--set", "no_finding=all"], "is for chexpert and mimic; nih has no label that it changes"),
     ("xray:covidx:{}", ["--set", "no_finding=all"], "--set no_finding=all is not for covidx"),
     ("xray:mimic:{}", ["--set", "no_finding=devices"], "there are: findings, all"),
     ("xray:nih:{}", ["--set", "views=LL"], "AP (44,810), PA (67,310)"),
     ("xray:nih:{}", ["--set", "labels={}/absent.csv"], "there is no label file"),
     ("xray:nih:{}", ["--under", "val"], "there are: train, test"),
     ("xray:mimic:{}", ["--under", "val", "--set", "split=published"], "train, validate, test"),
     ("xray:covidx:{}", ["--set", "views=PA"], "--set views=PA is not for covidx"),
     ("xray:tuberculosis:{}", ["--set", "split=patients"], "split=published is"),
     ("sklearn:digits", ["--set", "views=PA"], "kind sklearn have no settings")],
)  # fmt: skip
def test_input_that_cannot_be_used(tmp_path, capsys, source, options, said):
    options = [word.format(tmp_path) for word in options]
    assert said in refused(capsys, source.format(tmp_path), tmp_path, *options)


@pytest.mark.parametrize(
    ("text", "said"),
    [("Image Index,Finding_Labels\n", "lacks the column 'Finding Labels', 'Patient ID'"), ("", "cannot be read"),
     (f"{COLUMNS},Patient Sex\n", "cannot read|no rows"),
     (f"{COLUMNS},Patient Sex\n1.png,Mass,,50,PA,M\n", "name no patient, such as 1.png"),
     (f"{COLUMNS},Patient Sex\n,Mass,1,50,PA,M\n2.png,Mass,1,50,PA,M\n", "1 rows name no image"),
     (f"{COLUMNS},Patient Sex\n1.png,Mass|Lump,1,50,PA,M\n", "the finding 'Lump' is none of Atelectasis")],
)  # fmt: skip
def test_label_files_that_cannot_be_used(tmp_path, capsys, text, said):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    found = refused(capsys, f"xray:nih:{tmp_path}", tmp_path, "--set", f"labels={path}")
    assert any(part in found for part in said.split("|")) and "rows.csv" in found


def test_label_files_of_chexpert_that_cannot_be_used(tmp_path, capsys):
    chexpert_file(tmp_path / "train.csv", 10, Pneumonia=3)
    assert "the label 3 is none of" in refused(capsys, f"xray:chexpert:{tmp_path}", tmp_path)
    chexpert_file(tmp_path / "train.csv", 10, "test")
    assert "expected paths such as train/" in refused(capsys, f"xray:chexpert:{tmp_path}", tmp_path)
    shipped = (SHIPPED / "chexpert_train.csv.gz").read_bytes()
    (tmp_path / "cut.csv.gz").write_bytes(shipped[:5000])
    said = refused(capsys, f"xray:chexpert:{tmp_path}", tmp_path, "--set", f"labels={tmp_path / 'cut.csv.gz'}")
    assert "cannot be read as a table" in said


def test_without_torchxrayvision_it_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchxrayvision", None)
    assert "pip install torchxrayvision" in refused(capsys, f"xray:nih:{tmp_path}", tmp_path)


AGES = {"nih": "Patient Age", "chexpert": "Age", "padchest": "StudyDate_DICOM"}
SEXES = {"nih": "Patient Gender", "chexpert": "Sex", "padchest": "PatientSex_DICOM"}


@pytest.mark.parametrize("name", AGES)
@pytest.mark.parametrize("how", ["058Y", "absent", ""])
def test_what_is_not_used_is_no_reason_to_refuse(tmp_path, name, how):
    """NIH's table of 2017 has ages such as 058Y."""
    table = read_shipped(name).head(200).drop(columns=["Patient Sex"], errors="ignore")
    others = [AGES[name], SEXES[name]]
    table.assign(**{SEXES[name]: "M"}).to_csv(tmp_path / "plain.csv", index=False)
    strange = (
        table.drop(columns=others, errors="ignore") if how == "absent" else table.assign(**dict.fromkeys(others, how))
    )
    strange.to_csv(tmp_path / "strange.csv", index=False)
    plain, found = (read_labels(name, tmp_path, tmp_path / f"{file}.csv") for file in ("plain", "strange"))
    assert len(found) > 100
    for column in ("files", "values", "views", "patients"):
        np.testing.assert_array_equal(getattr(found, column), getattr(plain, column))
    if name == "nih":
        assert found.files.tolist() == table["Image Index"].tolist()


def test_dates_of_mimic_are_not_used(tmp_path):
    images = mimic_set(tmp_path)
    metadata = tmp_path / "mimic-cxr-2.0.0-metadata.csv"
    pd.read_csv(metadata).drop(columns="StudyDate").to_csv(metadata, index=False)
    found = read_labels("mimic", tmp_path, tmp_path / "mimic-cxr-2.0.0-chexpert.csv", metadata)
    assert sorted(found.files) == sorted(images["file"])
