"""The labels of X-ray sets as torchxrayvision reads them: its dataset classes, and the label files that it ships.

No image is touched here. torchxrayvision (https://github.com/mlmed/torchxrayvision) is imported when it is needed.
"""

from __future__ import annotations

import hashlib
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from loaders.errors import SystemRefusal, UserError, told

if TYPE_CHECKING:
    import pandas as pd

_FINDINGS = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
_TUBE = "Tube"  # later versions of torchxrayvision label it in PadChest; the paper's 27 labels are the others


@dataclass(frozen=True)
class Labels:
    """The images of a label file, in its order. n images, L labels."""

    files: np.ndarray
    """(n,) str: path of each image as the label file has it: within the set's folder, or the name alone."""
    values: np.ndarray
    """(n, L) float32: 1, 0, or NaN for unknown."""
    names: tuple[str, ...]
    """Of the labels, as torchxrayvision calls and orders them: sorted when "Effusion" was still "Pleural Effusion"."""
    views: np.ndarray
    """(n,) str: PA, AP, L and so on."""
    patients: np.ndarray
    """(n,) str."""

    def __len__(self) -> int:
        return len(self.files)

    def take(self, rows: np.ndarray) -> Labels:
        """The rows chosen by a mask or by their numbers."""
        columns = {each.name: getattr(self, each.name) for each in fields(self)}
        return Labels(**{name: column if name == "names" else column[rows] for name, column in columns.items()})


@dataclass(frozen=True)
class _Set:
    """How to read one set."""

    reader: str
    """The class of torchxrayvision.datasets."""
    columns: tuple[str, ...]
    """What it, or this module, takes from the label file."""
    files: Callable
    """Files of a table of rows."""
    patients: Callable
    """Patients of a table of rows; null where a row names none."""
    unused: Mapping[str, object] = field(default_factory=dict)
    """What torchxrayvision reads besides: what it is given for it, whatever the label file has."""


def _mimic_files(table: pd.DataFrame) -> pd.Series:
    subject, study = table["subject_id"].astype(str), table["study_id"].astype(str)
    return "files/p" + subject.str[:2] + "/p" + subject + "/s" + study + "/" + table["dicom_id"] + ".jpg"


_METADATA = ("subject_id", "study_id", "dicom_id", "ViewPosition")
_SETS = {
    "chexpert": _Set(
        "CheX_Dataset",
        ("Path", "Frontal/Lateral", "AP/PA", "No Finding", *_FINDINGS),
        lambda table: table["Path"].str.replace(r"^CheXpert-v1\.0(-small)?/", "", regex=True),
        lambda table: table["Path"].str.extract(r"/patient(\d+)/", expand=False),
        {"Sex": "Unknown", "Age": 0},
    ),
    "mimic": _Set(
        "MIMIC_Dataset",
        ("subject_id", "study_id", "No Finding", *_FINDINGS),
        _mimic_files,
        lambda table: table["subject_id"],
    ),
    "nih": _Set(
        "NIH_Dataset",
        ("Image Index", "Finding Labels", "Patient ID", "View Position"),
        lambda table: table["Image Index"],
        lambda table: table["Patient ID"],
        {"Patient Gender": "", "Patient Age": 0},
    ),
    "padchest": _Set(
        "PC_Dataset",
        ("ImageID", "Labels", "PatientID", "PatientBirth", "Projection"),
        lambda table: table["ImageID"],
        lambda table: table["PatientID"],
        {"PatientSex_DICOM": "", "StudyDate_DICOM": 20190101},
    ),
}


def read_labels(
    name: str, folder: Path, file: Path | None = None, metadata: Path | None = None, *, clear_devices: bool = False
) -> Labels:
    """All images of a label file of `name`, of every view, in the file's order.

    `file`: the label file; None for the one that torchxrayvision ships (chexpert, nih, padchest). `metadata`: MIMIC's
    table of images. `clear_devices`, of chexpert and mimic: "Support Devices" too is 0 where a row says "No Finding",
    as the paper's code has it. `folder` must be one, and is not looked into. torchxrayvision leaves out some rows of
    PadChest: without labels, of files known to be broken, of patients who were born after 2008 or nobody knows when.
    UserError for a file that is none, or that lacks a column.
    """
    made = _SETS[name]
    with TemporaryDirectory() as made_here:
        words = {}
        if file is not None:
            table = read_table(file, made.columns)
            path = _rewritten(Path(made_here, "labels.csv"), table, made.unused)
            words["csvpath"] = _named_after_rows(path, table, file) if name == "chexpert" else str(path)
        if metadata is not None:
            path = Path(made_here, "metadata.csv")
            words["metacsvpath"] = str(_rewritten(path, read_table(metadata, _METADATA), {"StudyDate": 0}))
        given = " and ".join(str(each) for each in (file, metadata) if each is not None)
        dataset = _dataset(made.reader, folder, words, given or "the label file that it ships")
    table, labels = dataset.csv.reset_index(drop=True), np.asarray(dataset.labels, np.float32)
    names = [str(label) for label in dataset.pathologies]
    place = str(file or dataset.csvpath)
    if name == "mimic":  # a study without images
        there = table["dicom_id"].notna().to_numpy()
        table, labels = table[there], labels[there]
    if clear_devices:
        labels = labels.copy()
        labels[table["No Finding"].to_numpy() == 1, names.index("Support Devices")] = 0
    if name == "nih":  # a finding spelt otherwise would be read as absent
        said = set("|".join(table["Finding Labels"].unique()).split("|"))
        if strange := sorted(said - {*names, "No Finding", ""}):
            raise UserError(f"label file {place}: the finding {strange[0]!r} is none of {', '.join(names)}")
    if name == "padchest":
        order = _file_order(table["ImageID"], Path(place))
        kept = [k for k, label in enumerate(names) if label != _TUBE]
        table, labels, names = table.iloc[order], labels[order][:, kept], [names[k] for k in kept]
    patients, files = made.patients(table), made.files(table)
    if files.isna().any():
        raise UserError(f"label file {place}: {files.isna().sum():,} rows name no image; download it again")
    files = files.astype(str).to_numpy(object)
    _check_rows(files, labels, patients.isna().to_numpy(), place)
    views = table["view"].astype(str).to_numpy(object)
    return Labels(files, labels, tuple(names), views, patients.astype(str).to_numpy(object))


def _rewritten(path: Path, table: pd.DataFrame, unused: Mapping[str, object]) -> Path:
    """A label file for torchxrayvision, in which what this module does not use is as it expects that.

    So an age such as 058Y, as in NIH's table of 2017, or a column that is missing is no reason to refuse a file.
    """
    table.assign(**unused).to_csv(path, index=False)
    return path


def read_table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """A CSV file, perhaps compressed, as a pandas table of these columns. UserError if it lacks one."""
    import pandas as pd  # comes with torchxrayvision

    if not path.is_file():
        raise UserError(f"there is no label file {path}")
    try:
        with told(f"label file {path} cannot be read"):
            there = pd.read_csv(path, nrows=0).columns.tolist()
            absent = [repr(name) for name in columns if name not in there]
            if absent:
                raise UserError(f"label file {path} lacks the column {', '.join(absent)}; it has {', '.join(there)}")
            return pd.read_csv(path, usecols=list(columns), low_memory=False)
    except UserError:
        raise
    except (ValueError, OSError, EOFError, zlib.error) as error:  # pandas' own are ValueErrors
        raise UserError(f"label file {path} cannot be read as a table: {error}; download it again") from error


def patient_numbers(patients: np.ndarray) -> np.ndarray:
    """(n,) int64: a patient's number where it fits, else the first 8 bytes of the SHA-256 of its name, halved."""
    number = {patient: _patient_number(patient) for patient in set(patients.tolist())}
    return np.array([number[patient] for patient in patients.tolist()], dtype=np.int64)


def _patient_number(patient: str) -> int:
    if patient.isdecimal() and int(patient) < 2**63:
        return int(patient)
    return int.from_bytes(hashlib.sha256(patient.encode(errors="surrogateescape")).digest()[:8], "big") >> 1


class _ChexpertFile(str):
    """A path that "contains" what CheX_Dataset looks for in it to know how its rows' paths begin: train or valid.

    The path itself may have neither in it, or, as in trainee/valid.csv, the wrong one.
    """

    side: str

    def __contains__(self, word: object) -> bool:
        return word == self.side


def _named_after_rows(path: Path, table: pd.DataFrame, file: Path) -> _ChexpertFile:
    first = str(table["Path"].iloc[0]) if len(table) else ""
    named = _ChexpertFile(path)
    named.side = "train" if "train/" in first else "valid"
    if f"{named.side}/" not in first:
        example = "train/patient00001/study1/view1_frontal.jpg"
        raise UserError(f"label file {file}: expected paths such as {example} or valid/…, found {first!r}")
    return named


def _dataset(reader: str, folder: Path, words: dict[str, str], found: str) -> Any:
    """One of torchxrayvision's datasets, of all views and images."""
    try:
        from torchxrayvision import datasets  # imports torch and pandas: slow, and no other source needs it
    except ImportError as error:
        raise UserError("X-ray sets need torchxrayvision: pip install torchxrayvision") from error
    state = np.random.get_state()  # it seeds NumPy's generator
    try:
        # Not its unique_patients: that mixes the first known value of each label over the images of a patient.
        with warnings.catch_warnings(), told(f"{found} cannot be read"):
            warnings.simplefilter("ignore")  # pandas' about code of torchxrayvision
            return getattr(datasets, reader)(str(folder), **words, views=["*"], unique_patients=False)
    except SystemRefusal:
        raise
    except Exception as error:  # it raises bare ones, and pandas whatever a strange file leads to
        raise UserError(
            f"torchxrayvision's {reader} cannot read {found} ({type(error).__name__}: {error});"
            " is this the label file of this set, as published?"
        ) from error
    finally:
        np.random.set_state(state)


def _file_order(images: pd.Series, path: Path) -> np.ndarray:
    """Places of PC_Dataset's rows, which it sorted by name, such that they are as in the label file again."""
    place = {image: number for number, image in enumerate(read_table(path, ("ImageID",))["ImageID"].tolist())}
    return np.argsort([place[image] for image in images.tolist()], kind="stable")


def _check_rows(files: np.ndarray, labels: np.ndarray, nameless: np.ndarray, place: str) -> None:
    if not len(files):
        raise UserError(f"label file {place} has no rows that can be used")
    if nameless.any():
        raise UserError(f"label file {place}: {nameless.sum():,} rows name no patient, such as {files[nameless][0]}")
    strange = labels[~(np.isnan(labels) | (labels == 0) | (labels == 1))]
    if len(strange):
        raise UserError(f"label file {place}: the label {strange[0]:g} is none of 1, 0, -1 (uncertain) or empty")
