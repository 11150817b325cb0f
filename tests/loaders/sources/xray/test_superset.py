"""The paper's supersets, from the real label files to packs read as one, counted by pandas on those files."""

import numpy as np
import pandas as pd
import pytest
import torch

from engine.config.loading import load
from engine.config.schema import PretrainConfig
from engine.training import evaluate, losses
from loaders.packs import superset
from loaders.packs.shard import Pack
from tests.loaders.sources.xray.test_labels import PADCHEST_WORDS
from tests.support.packing import run
from tests.support.xray import chexpert_file, mimic_set, read_shipped, stand_ins

SHARED = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Pneumonia", "Pneumothorax"]
IN_FILE = {"Effusion": "Pleural Effusion"}  # what CheXpert and MIMIC call it


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Packs of some rows of each label file with stand-ins for images; and the rows, taken by the test itself."""
    root, rows = tmp_path_factory.mktemp("sets"), {}

    def pack(name, *options):
        views = ["--set", "views=" + ("AP,PA,L" if name == "chexpert" else "AP,PA")]
        assert run(f"xray:{name}:{root / name}", root / f"{name}.h5", "--workers", "0", *views, *options) == 0

    for name in ("chexpert", "mimic", "nih", "padchest"):
        (root / name).mkdir()
    rows["chexpert"] = chexpert_file(root / "chexpert" / "train.csv", 90)
    stand_ins(root / "chexpert", rows["chexpert"]["file"])
    pack("chexpert")
    mimic = mimic_set(root / "mimic")
    rows["mimic"] = mimic[mimic["ViewPosition"].isin(["PA", "AP"])]
    pack("mimic")
    rows["nih"] = read_shipped("nih").iloc[::1500]
    rows["nih"].to_csv(root / "nih.csv", index=False)
    stand_ins(root / "nih" / "images", rows["nih"]["Image Index"], "PNG")
    pack("nih", "--set", f"labels={root / 'nih.csv'}")
    padchest = read_shipped("padchest").iloc[::900]
    padchest.to_csv(root / "padchest.csv", index=False)
    usable = padchest["Labels"].notna() & (padchest["PatientBirth"] < 2009)
    rows["padchest"] = padchest[usable & padchest["Projection"].isin(["PA", "AP"])]
    stand_ins(root / "padchest", rows["padchest"]["ImageID"], "PNG")
    pack("padchest", "--set", f"labels={root / 'padchest.csv'}")
    return root, rows


def truth(name, rows, label):
    """A label of the rows, from the columns of the label file: 1, 0, or NaN."""
    if name == "nih":
        return rows["Finding Labels"].str.split("|").map(lambda found: float(label in found))
    if name == "padchest":
        words = PADCHEST_WORDS[label].split("|")
        return rows["Labels"].map(lambda found: float(any(word in found for word in words)))
    column = rows[IN_FILE.get(label, label)]
    return column.mask(column == -1).mask(rows["No Finding"] == 1, 0)


@pytest.mark.parametrize(
    ("names", "labels"),
    [(["chexpert"], 13), (["mimic"], 13), (["nih"], 14), (["padchest"], 27), (["chexpert", "mimic"], 13),
     (["chexpert", "mimic", "nih"], 7), (["chexpert", "padchest"], 9), (["chexpert", "mimic", "padchest"], 9),
     (["mimic", "nih", "padchest"], 7), (["padchest", "nih", "mimic", "chexpert"], 7)],
)  # fmt: skip
def test_sizes_and_counts(sets, names, labels):
    root, rows = sets
    whole = Pack.open([root / f"{name}.h5" for name in names])
    assert len(whole.class_names) == labels
    recipe = "_".join(sorted(names)) + "_r50x1"
    assert load(PretrainConfig, recipe, ["data.train=x"], "pretrain").model.num_classes == labels
    assert [stop - start for _, start, stop in whole.parts] == [len(rows[name]) for name in names]
    if labels == 7:
        assert whole.class_names == SHARED
    table = superset.counts(whole.labels, whole.class_names, whole.parts).splitlines()
    for row, label in zip(table[1:], whole.class_names, strict=True):
        if len(names) < 2 or label not in SHARED:
            continue
        columns = [truth(name, rows[name], label) for name in names]
        columns.append(pd.concat(columns))
        expected = [f"{int((column == 1).sum())} of {int(column.notna().sum())}" for column in columns]
        assert " ".join(row.removeprefix(label).split()) == " ".join(expected)


def test_some_labels_are_unknown_and_some_known(sets):
    """What the superset is for: the loss and the AUC take the known ones alone."""
    root, _ = sets
    whole = Pack.open([root / f"{name}.h5" for name in ("chexpert", "nih")])
    unknown = np.isnan(whole.labels)
    assert 0 < unknown.mean() < 1
    logits = torch.randn(whole.labels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total, count = losses.masked_bce(logits, torch.from_numpy(whole.labels.copy()))
    chances = 1 / (1 + np.exp(-logits.numpy()))
    by_hand = -np.where(whole.labels == 1, np.log(chances), np.log1p(-chances))[~unknown].sum()
    assert (total.item(), count.item()) == (pytest.approx(by_hand), (~unknown).sum())
    one_value = [name for k, name in enumerate(SHARED) if len(set(whole.labels[~unknown[:, k], k].tolist())) < 2]
    assert evaluate.without_auc(whole.labels, whole.class_names) == one_value
