"""A held-out share of a pack, against the packs that packing makes of the same images."""

import subprocess
import sys

import numpy as np
import pytest

from loaders.errors import UserError
from loaders.packs import holdout
from loaders.packs.shard import Pack
from loaders.packs.writer import Record, ShardWriter, new_attributes
from tests.conftest import ROOT
from tests.support.pictures import encoded, photo


def test_the_same_as_when_packing(digits, tmp_path):
    command = ["-m", "loaders.pack", "sklearn:digits", tmp_path / "all.h5", "--workers", "1", "--classes", "5,6,7,8,9"]
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
    pack = Pack.open(tmp_path / "all.h5")
    for ids, name in zip(holdout.parts(pack, 0.3), ("high-train.h5", "high-test.h5"), strict=True):
        assert (np.diff(ids) > 0).all()
        assert sorted(pack.keys[i] for i in ids) == sorted(Pack.open(digits / name).keys)


def test_patients_are_on_one_side(tmp_path):
    image = encoded(photo(0, 8, 8))
    patients = np.random.default_rng(0).integers(0, 60, 200)
    with ShardWriter(tmp_path / "p.h5", ["a", "b"], new_attributes({"source": "s", "kind": "test"}, 1)[0]) as writer:
        for i, patient in enumerate(patients.tolist()):
            writer.add(Record(image, f"image {i}", np.array([1, np.nan], np.float32), 8, 8, patient))
        writer.finish()
        writer.publish()
    pack = Pack.open(tmp_path / "p.h5")
    kept, held = holdout.parts(pack, 0.2)
    assert len(held) == pytest.approx(40, abs=5)
    assert not set(patients[kept]) & set(patients[held])
    assert sorted([*kept, *held]) == list(range(200))
    everything, none = holdout.parts(pack, 0)
    assert (everything.tolist(), none) == (list(range(200)), None)
    with pytest.raises(UserError, match="leaves nothing to train on"):
        holdout.parts(pack, 1e-9)


def made(path, labels, groups):
    image = encoded(photo(0, 8, 8))
    names = [str(n) for n in range(4)]
    with ShardWriter(path, names, new_attributes({"source": "s", "kind": "test"}, 1)[0]) as writer:
        for i, (label, group) in enumerate(zip(labels, groups, strict=True)):
            writer.add(Record(image, f"image {i}", int(label), 8, 8, int(group)))
        writer.finish()
        writer.publish()
    return Pack.open(path)


def test_folds_part_all_images_by_whole_groups(tmp_path):
    rng = np.random.default_rng(1)
    groups = np.where(rng.random(300) < 0.3, -1, rng.integers(0, 80, 300))
    pack = made(tmp_path / "p.h5", rng.integers(0, 3, 300), groups)
    folds = [holdout.fold(pack, 5, number) for number in range(5)]
    assert sorted(np.concatenate([held for _, held in folds]).tolist()) == list(range(300))
    for kept, held in folds:
        assert sorted([*kept, *held]) == list(range(300))
        assert not ({*groups[kept]} & {*groups[held]}) - {-1}
        assert len(held) == pytest.approx(60, abs=25)
    again = made(tmp_path / "again.h5", pack.labels, groups)
    np.testing.assert_array_equal(holdout.fold(again, 5, 3)[1], folds[3][1])


def test_folds_have_as_many_of_each_class(tmp_path):
    labels = np.repeat([0, 1, 2, 3], [100, 41, 3, 1])
    pack = made(tmp_path / "p.h5", labels, np.full(len(labels), -1))
    counts = np.array([np.bincount(labels[holdout.fold(pack, 4, number)[1]], minlength=4) for number in range(4)])
    assert (np.ptp(counts, axis=0) <= 1).all() and np.ptp(counts.sum(1)) <= 1
    with pytest.raises(UserError, match="some would be empty"):
        holdout.fold(pack, 146, 0)
    one = made(tmp_path / "one.h5", labels, np.zeros(len(labels)))
    with pytest.raises(UserError, match="folds=2 of 145 images in fewer groups"):
        holdout.fold(one, 2, 0)


def test_a_part_of_a_part_is_held_out(tmp_path):
    groups = np.arange(200) // 4
    pack = made(tmp_path / "p.h5", np.arange(200) % 2, groups)
    rest, test = holdout.parts(pack, 0.2)
    train, val = holdout.parts(pack, 0.25, rest, "data.val")
    assert sorted([*train, *val, *test]) == list(range(200))
    assert len(val) == 40 and not {*groups[train]} & {*groups[val]} and not {*groups[test]} & {*groups[val]}
    with pytest.raises(UserError, match="data.val=0.001 of 160 images"):
        holdout.parts(pack, 0.001, rest, "data.val")
