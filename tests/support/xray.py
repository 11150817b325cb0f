"""X-ray sets as tests make them, from the real label files and stand-ins for the images; and packs of these."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torchxrayvision

from loaders.packs.shard import Pack
from tests.support.packing import run
from tests.support.pictures import encoded, photo

SHIPPED = Path(torchxrayvision.__file__).parent / "data"
_FILES = {
    "nih": "Data_Entry_2017_v2020.csv.gz",
    "chexpert": "chexpert_train.csv.gz",
    "padchest": "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz",
}


@lru_cache
def read_shipped(name):
    """A label file that torchxrayvision ships, as a table; the real one of the set."""
    return pd.read_csv(SHIPPED / _FILES[name], low_memory=False)


def stand_ins(root, files, kind="JPEG"):
    """Small gray pictures in place of X-rays; returns {file: bytes}."""
    written = {}
    for seed, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        written[file] = encoded(photo(seed, 12, 10, "L"), kind)
        (root / file).write_bytes(written[file])
    return written


def chexpert_file(path, rows, side="train", **columns):
    """The first rows of CheXpert's label file, with columns `file` (as on disk) and `patient` besides."""
    table = read_shipped("chexpert").head(rows).assign(**columns)
    table["Path"] = table["Path"].str.replace("CheXpert-v1.0-small/train", f"CheXpert-v1.0/{side}")
    table.to_csv(path, index=False)
    file = table["Path"].str.removeprefix("CheXpert-v1.0/")
    return table.assign(file=file, patient=file.str.split("/").str[1].str.removeprefix("patient"))


def mimic_set(root, packed_with=""):
    """MIMIC's three tables and stand-ins for its images; the images with their labels as a table."""
    rng = np.random.default_rng(0)
    findings = read_shipped("chexpert").columns[5:]
    studies = pd.DataFrame({"subject_id": 10000032 + np.repeat(np.arange(12), 2), "study_id": 50414267 + np.arange(24)})
    labels = {name: rng.choice([1.0, 0.0, -1.0, np.nan], 24) for name in findings}
    studies = pd.concat([studies, pd.DataFrame(labels)], axis=1)
    ids = studies[["subject_id", "study_id"]]
    images = pd.concat([ids.head(20), ids.head(20)], ignore_index=True)  # of the last two patients there are none
    images["dicom_id"] = [f"{k:08x}-0c1e-{k:04x}" for k in range(len(images))]
    images["ViewPosition"] = rng.choice(["PA", "AP", "LATERAL", None], len(images))
    images["StudyDate"] = 21800506
    images["split"] = rng.choice(["train", "validate", "test"], len(images))
    for name, table in (
        ("chexpert", studies), ("metadata", images.drop(columns="split")),
        ("split", images[["dicom_id", "study_id", "subject_id", "split"]]),
    ):  # fmt: skip
        table.to_csv(root / f"mimic-cxr-2.0.0-{name}.csv{packed_with}", index=False)
    images["file"] = [
        f"files/p{subject // 1_000_000}/p{subject}/s{study}/{dicom}.jpg"
        for subject, study, dicom in zip(images["subject_id"], images["study_id"], images["dicom_id"], strict=True)
    ]
    stand_ins(root, images["file"])
    return images.merge(studies, on=["subject_id", "study_id"])


def pack_of(source, tmp_path, *options):
    """The pack, made from the command line and verified."""
    assert run(source, tmp_path / "out.h5", "--workers", "0", "--force", *options) == 0
    opened = Pack.open(tmp_path / "out.h5")
    assert opened.verify() == []
    return opened
