"""Packs read as one superset, against pandas, which joins tables by the names of their columns."""

import itertools
import json
import pickle

import numpy as np
import pandas as pd
import pytest

from engine import pretrain
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.config.data import DataConfig
from engine.config.schema import ModelConfig, OptimConfig, PretrainConfig, TrainConfig
from engine.training import assemble
from loaders.errors import UserError
from loaders.packs import agree, superset
from loaders.packs.shard import Pack
from loaders.packs.writer import Record, ShardWriter, new_attributes
from tests.support.pictures import encoded, photo

CHEX = ["Atelectasis", "Cardiomegaly", "Edema", "Effusion", "Fracture", "Pneumonia"]
NIH = ["Effusion", "Edema", "Hernia", "Pneumonia", "Atelectasis"]
PADCHEST = ["Scoliosis", "Pneumonia", "Atelectasis", "Effusion", "Fracture"]
COMMON = ["Atelectasis", "Effusion", "Pneumonia"]


def write(path, names, records, seed, shards=1, single=False):
    """A pack of small pictures with random labels, some unknown; the labels as a data frame."""
    rng = np.random.RandomState(seed)
    labels = rng.choice([0.0, 1.0, np.nan], (records, len(names)), p=[0.6, 0.3, 0.1])
    attributes = new_attributes({"source": "made up", "kind": "test"}, shards)
    bounds = [round(k * records / shards) for k in range(shards + 1)]
    for k in range(shards):
        name = path if shards == 1 else path.with_name(f"{path.stem}-{k:05d}-of-{shards:05d}.h5")
        with ShardWriter(name, names, attributes[k]) as writer:
            for i in range(bounds[k], bounds[k + 1]):
                label = i % len(names) if single else labels[i].tolist()
                writer.add(Record(encoded(photo(seed + i, 32, 32)), f"{path.stem} {i}", label, 32, 32))
            writer.finish()
            writer.publish()
    return pd.DataFrame(labels.astype(np.float32), columns=names)


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs")
    frames = {
        "chex": write(folder / "chex.h5", CHEX, 20, 1),
        "nih": write(folder / "nih.h5", NIH, 15, 2, shards=3),
        "padchest": write(folder / "padchest.h5", PADCHEST, 11, 3),
    }
    return folder, frames


@pytest.mark.parametrize("order", list(itertools.permutations(["chex", "nih", "padchest"])))
def test_the_labels_that_all_have_are_joined_by_name(packs, order):
    folder, frames = packs
    whole = Pack.open([folder / f"{name}.h5" for name in order])
    expected = pd.concat([frames[name] for name in order], join="inner")
    assert set(expected.columns) == set(COMMON)
    assert whole.class_names == COMMON  # whatever the order of the packs
    np.testing.assert_array_equal(whole.labels, expected[COMMON].to_numpy())
    assert whole.class_counts.tolist() == (expected[COMMON] == 1).sum().tolist()
    assert [whole.keys[i].split()[0] for i in (0, len(whole) - 1)] == [order[0], order[-1]]
    again = pickle.loads(pickle.dumps(whole))
    assert again.class_names == COMMON
    np.testing.assert_array_equal(again.labels, whole.labels)


def test_packs_of_the_same_labels_keep_their_order(tmp_path):
    names = ["b", "a"]
    first, second = write(tmp_path / "x.h5", names, 4, 1), write(tmp_path / "y.h5", names, 3, 2)
    whole = Pack.open([tmp_path / "x.h5", tmp_path / "y.h5"])
    assert whole.class_names == names
    np.testing.assert_array_equal(whole.labels, pd.concat([first, second]).to_numpy())


def test_a_test_set_is_read_with_the_labels_of_training(packs):
    folder, frames = packs
    test = Pack.open(folder / "nih.h5", labels=COMMON)
    np.testing.assert_array_equal(test.labels, frames["nih"][COMMON].to_numpy())
    with pytest.raises(UserError, match=r"nih.* lacks the labels Fracture; it has Effusion"):
        Pack.open(folder / "nih.h5", labels=["Edema", "Fracture"])


def test_counts_for_each_set_and_label(packs):
    folder, frames = packs
    names = ["chex", "nih", "padchest"]
    whole = Pack.open([folder / f"{name}.h5" for name in names])
    assert [(name, stop - start) for name, start, stop in whole.parts] == [("chex", 20), ("nih", 15), ("padchest", 11)]
    head, *rows = superset.counts(whole.labels, whole.class_names, whole.parts).splitlines()
    assert head.split()[3:] == ["chex", "(20)", "nih", "(15)", "padchest", "(11)", "together", "(46)"]
    sets = [*(frames[name] for name in names), pd.concat(frames.values(), join="inner")]
    for row, label in zip(rows, COMMON, strict=True):
        counts = [(int((frame[label] == 1).sum()), int(frame[label].notna().sum())) for frame in sets]
        assert row.split() == [label, *" ".join(f"{yes} of {known}" for yes, known in counts).split()]


def test_sets_that_cannot_be_joined(packs, tmp_path):
    folder, _ = packs
    write(tmp_path / "other.h5", ["Cat", "Dog"], 3, 4)
    with pytest.raises(UserError, match=r"other.h5 has no label in common .* Cat, Dog, and .*chex.h5 Atelectasis"):
        Pack.open([folder / "chex.h5", tmp_path / "other.h5"])
    write(tmp_path / "single.h5", ["Cat", "Dog"], 3, 5, single=True)
    for order in (["single", "other"], ["other", "single"]):
        with pytest.raises(UserError, match=r"single.h5 has one class per image and .*other.h5 label vectors"):
            Pack.open([tmp_path / f"{name}.h5" for name in order])
    write(tmp_path / "more.h5", ["Cat", "Dog", "Fox"], 3, 6, single=True)
    with pytest.raises(UserError, match="class names differ"):
        Pack.open([tmp_path / "single.h5", tmp_path / "more.h5"])
    with pytest.raises(UserError, match="one class per image"):
        Pack.open(tmp_path / "single.h5", labels=["Cat"])


def test_classes_are_not_scored_on_label_vectors_of_the_same_names(tmp_path):
    for name, single in (("classes", True), ("vectors", False)):
        write(tmp_path / f"{name}.h5", COMMON, 6, 1, single=single)
    for train, test in (("classes", "vectors"), ("vectors", "classes")):
        with pytest.raises(UserError, match=r"classes.h5 has one class per image and .*vectors.h5 label vectors"):
            agree.open_test(tmp_path / f"{test}.h5", Pack.open(tmp_path / f"{train}.h5"))


def test_pre_training_on_a_superset_says_what_is_in_it_and_what_cannot_be_scored(packs, tmp_path, capsys):
    folder, _ = packs
    write(tmp_path / "val.h5", ["Pneumonia", "Effusion", "Atelectasis", "Mass"], 1, 7)  # one image: no label has both
    config = PretrainConfig(
        name="superset",
        folder=str(tmp_path / "run"),
        data=DataConfig(train=[str(folder / f"{n}.h5") for n in ("padchest", "chex", "nih")],
                        val=str(tmp_path / "val.h5"), overlap="allow", augment="xray", size=32, backend="host"),
        model=ModelConfig(name="R20x0.25-32px", num_classes=3),
        optim=OptimConfig(base_lr=0.01),
        train=TrainConfig(global_batch=8, device="cpu", precision="fp32"),
    )  # fmt: skip
    comm = Communicator(Launch("alone"))
    pretrain.pretrain(config, comm, dry_run=True)
    said = capsys.readouterr().out
    assert "3 classes, binary cross entropy" in said
    assert "padchest (11)  chex (20)  nih (15)  together (46)" in said
    assert "3 of 3 labels have no AUC" in said
    parts = assemble.pretraining(config, comm)
    assert parts.feed.test.class_names == parts.feed.train.class_names == COMMON


def test_two_ranks_train_on_a_superset_as_one_does(packs, tmp_path, launch):
    """Each rank knows another number of labels: the mean is over all that are known, on whichever rank."""
    folder, _ = packs
    events = {}
    for ranks in (1, 2):
        run = tmp_path / f"ranks{ranks}"
        common = ["-m", "engine.pretrain", "demo", "model.name=R20x0.25-32px", "data.augment=xray", "data.size=32",
                  f"data.train=[{folder / 'chex.h5'},{folder / 'nih.h5'}]",
                  "data.resize=null", "train.global_batch=8", "schedule.epochs=null", "schedule.steps=4",
                  "schedule.warmup_steps=1", "train.log_every=1", "train.eval_every=0.5", f"folder={run}",
                  "data.overlap=allow"]  # fmt: skip
        done = launch(ranks, "mpirun", [*common, f"data.val={folder / 'padchest.h5'}"])
        assert done.returncode == 2, done.stdout
        assert done.stderr.count("padchest.h5 lacks the labels Edema") == 1  # which the other two share
        done = launch(ranks, "mpirun", [*common, f"data.val={folder / 'nih.h5'}"])
        assert done.returncode == 0, done.stderr
        assert "4 classes, binary cross entropy" in done.stdout
        assert done.stdout.count("warning: 15 of 15 images of data.val are in data.train too") == 1
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        events[ranks] = [line for line in lines if "loss" in line]
    assert len(events[1]) == len(events[2]) >= 5
    for one, two in zip(events[1], events[2], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one.get("mean_auc") == pytest.approx(two.get("mean_auc"), abs=1e-3)
