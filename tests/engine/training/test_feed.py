import numpy as np
import pytest

from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.config.data import DataConfig
from engine.config.schema import ModelConfig, OptimConfig, PretrainConfig, TrainConfig
from engine.training import assemble, feed
from loaders import pack
from loaders.errors import UserError
from loaders.pipelines.order import Blocks
from tests.support.pictures import folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("feed")
    folder(root / "images", per_class=10)
    assert pack.main([str(root / "images"), str(root / "p.h5"), "--workers", "0", "--shards", "3"]) == 0
    return root / "p.h5"


def parts(packed, **data):
    return assemble.pretraining(
        PretrainConfig(
            name="test",
            data=DataConfig(
                train=str(packed), val=str(packed), size=32, **{"backend": "host", "overlap": "allow", **data}
            ),
            model=ModelConfig(name="R20x0.25-32px"),
            optim=OptimConfig(),
            train=TrainConfig(global_batch=8, device="cpu", precision="fp32"),
        ),
        Communicator(Launch("alone")),
    )


def test_the_configuration_reaches_the_order(packed):
    plan = parts(packed, shuffle="blocks", block=4, window=2, last="drop").feed.plan
    assert plan.blocks == Blocks(4, 2)
    assert plan.starts == (0, 10, 20)
    assert plan.last == "drop"
    assert plan.epoch_samples == 24  # three batches of 8 from 30 images
    assert parts(packed).feed.plan.blocks is None


def test_the_configuration_reaches_the_batches(packed):
    fed = parts(packed, check=1.0, bad_budget=0).feed
    fed.train.unsound = lambda ids: [i for i in ids.tolist() if i == 3]  # as if record 3 were damaged
    with pytest.raises(UserError, match=r"data\.bad_budget=0"):
        list(fed.train_batches(0, 4))
    fed = parts(packed, check=1.0, bad_budget=1).feed
    fed.train.unsound = lambda ids: [i for i in ids.tolist() if i == 3]
    ids = np.concatenate([batch.ids.numpy() for step in fed.train_batches(0, 4) for batch in step])
    assert 3 not in ids
    assert len(ids) == 32


def test_evaluation_sees_all(packed):
    fed = parts(packed).feed
    assert sorted(i for batch in fed.test_batches() for i in batch.ids[batch.valid].tolist()) == list(range(30))


@pytest.mark.parametrize(
    "wrong", [{"shuffle": "some"}, {"last": "skip"}, {"check": 2.0}, {"bad_budget": -1}, {"block": 0}, {"window": 0}]
)
def test_wrong_settings_are_refused(wrong):
    (key,) = wrong
    with pytest.raises(UserError, match=f"data.{key}"):
        DataConfig(train="p.h5", **wrong)


def test_order_takes_the_ranks_from_the_communicator():
    plan = feed.order(np.arange(10), 4, 2, 0, Communicator(Launch("alone")))
    assert (plan.rank, plan.world, plan.accumulate, plan.last) == (0, 1, 2, "wrap")
