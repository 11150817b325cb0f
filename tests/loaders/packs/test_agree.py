"""Images that are both trained on and scored on."""

import random

import numpy as np
import pytest

from loaders.errors import UserError
from loaders.packs import agree
from loaders.packs.shard import Pack
from loaders.packs.writer import Record, ShardWriter, new_attributes

KEYS = ("data.train", "data.test")


def pack(path, records):
    with ShardWriter(path, ["a"], new_attributes({"source": "", "kind": "test"}, 1)[0]) as writer:
        for number, data in enumerate(records):
            writer.add(Record(data, f"{path.stem}-{number}", 0, 1, 1))
        writer.finish()
        writer.publish()
    return path


@pytest.fixture
def made():
    """Records of made-up bytes, many of the same length."""
    chance = random.Random(3)
    return [chance.randbytes(20 + k % 5) for k in range(60)]


@pytest.mark.parametrize("common", [0, 1, 7])
def test_shared_images_are_counted(tmp_path, made, common):
    train = Pack.open([pack(tmp_path / "a.h5", made[:20]), pack(tmp_path / "b.h5", made[20:40])])
    test = Pack.open(pack(tmp_path / "test.h5", [*made[50:], *made[40 - common : 40]]))
    said = agree.shared(train, test, KEYS, "warn")
    if not common:
        assert said == ""
    else:
        assert f"warning: {common} of {10 + common} images of data.test are in data.train too" in said
        assert said.endswith("such as test-10")


@pytest.mark.parametrize("what", ["the same file", "a copy", "a part of it, in another order"])
def test_a_test_set_of_training_images_alone_is_refused(tmp_path, made, what):
    train = pack(tmp_path / "train.h5", made)
    test = train if what == "the same file" else pack(tmp_path / "t.h5", made if what == "a copy" else made[9:2:-1])
    opened = Pack.open(train), Pack.open(test)
    with pytest.raises(UserError, match=r"all \d+ images of data.test are in data.train .*data.overlap=allow"):
        agree.shared(*opened, KEYS, "warn")
    assert agree.shared(*opened, KEYS, "allow").startswith("warning: ")


def test_parts_of_one_pack(tmp_path, made):
    """As a holdout takes them: the pack has one image twice, and it is on both sides."""
    whole = Pack.open(pack(tmp_path / "p.h5", [*made, made[0]]))
    sides = np.arange(30), np.arange(30, 61)
    assert "1 of 31 images" in (said := agree.shared(whole, whole, KEYS, "warn", sides)) and said.endswith("p-60")
    assert agree.shared(whole, whole, KEYS, "warn", (np.arange(1, 30), sides[1])) == ""
