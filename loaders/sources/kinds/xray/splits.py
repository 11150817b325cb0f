"""Which images of an X-ray set are for training, and which for testing."""

from pathlib import Path

import numpy as np

from loaders.errors import UserError, unknown
from loaders.sources.kinds.xray.labels import Labels, patient_numbers, read_table
from loaders.sources.select import digests

SPLITS = ("patients", "published")
PUBLISHED = {
    "chexpert": ("train", "valid"),
    "mimic": ("train", "validate", "test"),
    "nih": ("train", "test"),
    "padchest": ("train", "test"),
}
_TEST_BELOW = np.uint64(2**64 // 10)
_NIH_LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
_MIMIC_TABLE = "mimic-cxr-2.0.0-split.csv"
_SEED = 42  # of the published code


def check_side(name: str, split: str, side: str) -> None:
    """UserError unless `split` of the set `name` has this side."""
    sides = PUBLISHED[name] if split == "published" else ("train", "test")
    if side not in sides:
        raise unknown(f"side of the {split} split of {name} (--under)", side, sides)


def side_of_split(name: str, labels: Labels, folder: Path, split: str, side: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """(n,) bool: the images on this side, and what to know about the split.

    `labels`: all images that take part, in the order of the label file. The published split of CheXpert is two label
    files, of which one is `labels` already. UserError if the folder lacks what the published split is drawn from.
    """
    if split == "patients":
        return held_out(labels.patients) == (side == "test"), ()
    if name == "nih":
        return _nih(labels, folder, side), ()
    if name == "mimic":
        return _mimic(labels, folder, side), ()
    if name == "padchest":
        return _padchest(labels, side)
    return np.ones(len(labels), bool), ()


def held_out(patients: np.ndarray) -> np.ndarray:
    """(n,) bool: whether a patient is for testing: those 10% whose SHA-256 is smallest of all that can be.

    A function of the patient alone, not of the views, labels or other patients that take part, so that no patient
    that one pack trains on is in the test part of another one of the same set (PadChest and PadChest-cl).
    """
    numbers, place = np.unique(patient_numbers(patients), return_inverse=True)
    return (digests([f"group {number}".encode() for number in numbers]) < _TEST_BELOW)[place]


def shuffled_first(count: int, share: float) -> np.ndarray:
    """(count,) bool: the first `share` after shuffling as the published code does."""
    chosen = np.zeros(count, bool)
    chosen[np.random.RandomState(_SEED).permutation(count)[: int(share * count)]] = True
    return chosen


def _nih(labels: Labels, folder: Path, side: str) -> np.ndarray:
    path = folder / _NIH_LISTS[side]
    if not path.is_file():
        raise UserError(
            f"the published split of nih needs {path}; it comes with the images"
            " (https://nihcc.app.box.com/v/ChestXray-NIHCC)"
        )
    return np.isin(labels.files.astype(str), path.read_text(encoding="utf-8", errors="replace").split())


def _mimic(labels: Labels, folder: Path, side: str) -> np.ndarray:
    table = read_table(find_table(folder, _MIMIC_TABLE), ("dicom_id", "split"))
    chosen = set(table["dicom_id"][table["split"] == side])
    return np.array([Path(file).stem in chosen for file in labels.files.tolist()], bool)


def _padchest(labels: Labels, side: str) -> tuple[np.ndarray, tuple[str, ...]]:
    train = shuffled_first(len(labels), 0.9)
    both = set(labels.patients[train]) & set(labels.patients[~train])
    note = (
        f"warning: the published split of PadChest is by image: {len(both):,} of its"
        f" {len(set(labels.patients[~train])):,} test patients are in the training part too;"
        " --set split=patients keeps them apart"
    )
    return train == (side == "train"), (note,)


def find_table(folder: Path, name: str) -> Path:
    """A table of the folder, packed with gzip or not."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(f"{folder} lacks {name} or {name}.gz; it is published with the images")
