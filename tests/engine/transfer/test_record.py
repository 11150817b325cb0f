"""What tells a run from another: what changes its result does, where it goes and how fast does not."""

import pytest

from engine.config.loading import load
from engine.config.schema import FinetuneConfig
from engine.transfer.record import fingerprint

WORDS = ["from=random", "model=R50x1", "data.train=a.h5", "data.test=b.h5"]


def of(*more):
    return fingerprint(load(FinetuneConfig, "natural", [*WORDS, *more], "finetune"))


@pytest.mark.parametrize(
    "word",
    ["folder=x", "results=x", "device=cpu", "graph=off", "recompute=unit", "accumulate=4", "micro_batch=8",
     "data.backend=host", "data.decode=cpu", "data.region=whole", "comm.slice_mib=1", "eval_every=10"],
)  # fmt: skip
def test_how_a_result_is_come_by_is_no_other_run(word):
    assert of(word) == of()


@pytest.mark.parametrize(
    "word", ["seed=1", "shots=5", "lr=0.1", "batch=64", "precision=fp32", "data.normalize=imagenet", "optim.eps=0.1",
             "rule.mixup=0", "comm.gradients=bf16", "head=default", "data.test=c.h5"],
)  # fmt: skip
def test_what_changes_a_result_is_another_run(word):
    assert of(word) != of()
