"""Audit mode: the same bits on any number of ranks, here threads; over processes in tests/engine/comm/test_ranks.py."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from engine import compiled, pretrain
from engine.comm.communicator import Communicator, SharedError
from engine.comm.launch import Launch
from engine.config.data import DataConfig
from engine.config.loading import load
from engine.config.schema import FinetuneConfig, PretrainConfig
from engine.network import bit
from engine.optim.agc_sgd import AgcSgd
from engine.optim.flat import FlatParameters
from engine.optim.groups import named_groups
from engine.optim.standardized import choose
from engine.training import objective, reproducible
from engine.training.evaluate import evaluate
from engine.training.precision import Precision
from engine.training.trainer import Trainer
from engine.transfer.plan import mixer
from loaders.errors import UserError
from loaders.pipelines.batches import Batch
from loaders.pipelines.order import EvalPlan
from tests.support.thread_ranks import on_ranks

STEPS, LEAVES, MICRO, CLASSES = 7, 8, 4, 5
BATCH = LEAVES * MICRO
CPU = torch.device("cpu")


def micro_batches(step, comm, vectors):
    """This rank's of a step: images of 8 pixels, labels of which some are unknown where they are vectors."""
    random = torch.Generator().manual_seed(step % STEPS)
    images = torch.randn(BATCH, 3, 8, 8, generator=random).to(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=random)
    if vectors:
        labels = torch.randint(0, 2, (BATCH, CLASSES), generator=random).float()
        labels[torch.rand(labels.shape, generator=random) < 0.4] = float("nan")
    each = LEAVES // comm.size
    for number in range(comm.rank * each, (comm.rank + 1) * each):
        own = slice(number * MICRO, (number + 1) * MICRO)
        ids = torch.arange(own.start, own.stop)
        yield Batch(images[own], labels[own], ids, torch.ones_like(ids, dtype=torch.bool))


def trained(parts, precision, implementation, vectors=False, mixed=False):
    """Bytes of weights and momentum, and the losses logged every other step; `parts`: ranks and steps, in turn."""
    saved, losses = None, []
    with torch.random.fork_rng(devices=[]):  # which all threads share
        torch.manual_seed(3)
        start = bit.build("R8x0.25-8px", CLASSES, zero_head=False)

    def body(comm, steps):
        model = copy.deepcopy(start)
        flat = FlatParameters(model, channels_last=True)
        standardized = choose(model, flat, Precision(precision, CPU).compute_dtype, "auto", implementation)
        mine = Trainer(
            model=model,
            flat=flat,
            optimizer=AgcSgd(
                named_groups(model, 1e-4, "none"),
                implementation=implementation,
                forward_weights=None if standardized is None else standardized.forward_weights,
            ),
            batches=iter(()),
            objective=objective.choose(np.zeros((1, CLASSES)) if vectors else np.zeros(1)),
            learning_rate=lambda step: 0.3 / (1 + step),
            comm=comm,
            precision=Precision(precision, CPU),
            total_steps=STEPS,
            global_batch=BATCH,
            leaves=LEAVES,
            slice_bytes=2**14,
            mix=mixer(0.4, 1, CLASSES) if mixed else None,
            before=lambda: list(micro_batches(mine.step - 1, comm, vectors)),
        )
        if saved is not None:
            model.load_state_dict(saved[0])
            mine.load_state(copy.deepcopy(saved[1]))
        for _ in range(steps):
            mine.train_step(list(micro_batches(mine.step, comm, vectors)))
            if mine.step % 2 == 0:
                losses.append((mine.step, mine.meter.read(BATCH)["loss"]))
        momentum = [state["momentum_buffer"].clone() for state in mine.optimizer.state.values()]
        return copy.deepcopy((model.state_dict(), mine.state())), [flat.values.clone(), *momentum]

    for ranks, steps in parts:
        on_each = on_ranks(ranks, partial(body, steps=steps))
        for _, others in on_each[1:]:
            assert all(map(torch.equal, others, on_each[0][1])), "ranks differ"
        saved = on_each[0][0]
    return [tensor.numpy().tobytes() for tensor in on_each[0][1]], sorted(set(losses))


WHOLE = [(1, STEPS)]


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_weights_momentum_and_losses_are_the_same_bits_on_any_ranks(precision, implementation):
    """Broken off after odd numbers of steps too, between two logged ones."""
    if implementation == "fused" and not compiled.loaded():
        pytest.skip("the extension is not built")
    whole = trained(WHOLE, precision, implementation)
    assert len(whole[1]) == STEPS // 2
    assert trained([(4, STEPS)], precision, implementation) == whole
    assert trained([(2, 3), (8, 1), (1, 1), (4, 2)], precision, implementation) == whole


@pytest.mark.parametrize(("vectors", "mixed"), [(True, False), (False, True), (True, True)])
def test_so_are_those_of_label_vectors_and_of_mixup(vectors, mixed):
    whole = trained(WHOLE, "fp32", "auto", vectors, mixed)
    assert trained([(4, 2), (2, 5)], "fp32", "auto", vectors, mixed) == whole


class Scores(nn.Module):
    """Logits of an image by itself."""

    def forward(self, images):
        return images.flatten(1)[:, :CLASSES] * 3


@pytest.mark.parametrize("kind", ["classes", "classes by area", "vectors"])
def test_scores_are_the_same_bits_on_any_number_of_ranks(kind):
    random = torch.Generator().manual_seed(0)
    images = torch.randn(301, 3, 2, 2, generator=random) * 10 ** torch.randn(301, 1, 1, 1, generator=random)
    labels = torch.randint(0, CLASSES, (301,), generator=random)
    if kind == "vectors":
        labels = torch.randint(0, 2, (301, CLASSES), generator=random).float()
    names = [str(k) for k in range(CLASSES)]

    def body(comm):
        plan = EvalPlan(np.arange(301), 8, comm.rank, comm.size)
        batches = []
        for number in range(len(plan)):
            ids, valid = map(torch.from_numpy, plan.batch_ids(number))
            batches.append(Batch(images[ids], labels[ids], ids, valid))
        chosen, precision = objective.choose(labels.numpy()), Precision("fp32", CPU)
        return evaluate(
            Scores(), batches, chosen, comm, precision, mean_auc="area" in kind, class_names=names
        )  # fmt: skip

    (alone,) = on_ranks(1, body)
    assert alone["images"] == 301
    for ranks in (2, 3, 4):
        for found in on_ranks(ranks, body):
            assert found == alone, ranks


@pytest.fixture
def switches_as_before():
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    threads = torch.get_num_threads()
    yield
    torch.set_deterministic_debug_mode(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
    torch.set_num_threads(threads)


def test_an_operator_whose_results_vary_ends_all_ranks_by_its_name(switches_as_before):
    Precision("fp32", CPU, reproducible=True).prepare()
    with pytest.raises(SharedError, match="torch's operator put_ vary"), reproducible.told():
        torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))
    with pytest.raises(RuntimeError, match="another"), reproducible.told():
        raise RuntimeError("another")


class Drops(nn.Module):
    drop_prob = 0.2


@pytest.mark.parametrize(
    ("module", "said"),
    [(nn.BatchNorm2d(3), "keeps statistics"), (nn.Dropout(0.1), "at random"), (Drops(), "at random")],
)
def test_networks_in_which_it_matters_who_saw_what_are_refused(module, said):
    with pytest.raises(UserError, match=f"1 of timm/x .*{said}"):
        reproducible.check_network(nn.Sequential(nn.Linear(3, 3), module), "timm/x")


def test_networks_of_the_family_are_not():
    reproducible.check_network(bit.build("R8x0.25-8px", 5), "R8x0.25-8px")
    reproducible.check_network(nn.Sequential(nn.Dropout(0.0), nn.BatchNorm2d(3, track_running_stats=False)), "x")


@pytest.mark.parametrize("decode", ["auto", "cpu"])
def test_images_are_decoded_where_none_has_a_say_in_another(decode):
    assert reproducible.decoded_alike(DataConfig(train="a.h5", decode=decode)).decode == "cpu"


@pytest.mark.parametrize("decode", ["gpu", "mixed"], ids=["all", "half"])  # "gpu" would mark it as one that needs one
def test_decoders_that_promise_no_bits_are_refused(decode):
    with pytest.raises(UserError, match=f"data.decode={decode}.*choose cpu"):
        reproducible.decoded_alike(DataConfig(train="a.h5", decode=decode))


WORDS = ["data.train=a.h5", "data.val=b.h5"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "train.micro_batch=…"),
        (["train.accumulate=2"], "train.micro_batch=…"),
        (["train.micro_batch=auto"], "train.micro_batch=…"),
        (["train.micro_batch=8", "train.graph=on"], "train.graph=on"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(words, said):
    with pytest.raises(UserError, match=f"train.reproducible=true.*{said}"):
        load(PretrainConfig, "demo", [*WORDS, "train.reproducible=true", *words], "pretrain")


def test_fine_tuning_says_its_own_keys():
    words = ["from=random", "data.train=a.h5", "data.test=b.h5", "reproducible=true"]
    with pytest.raises(UserError, match="^reproducible=true.* micro_batch=…"):
        load(FinetuneConfig, "natural", [*words, "accumulate=1"], "finetune")


def test_ranks_that_compute_otherwise_are_told_apart():
    alike = reproducible.described(CPU, 8, "host")[reproducible.ARITHMETIC]
    on_ranks(3, lambda comm: reproducible.check_ranks(alike, comm))

    def body(comm):
        with pytest.raises(SharedError) as raised:
            reproducible.check_ranks(alike | {"threads": 1 + (comm.rank == 2)}, comm)
        return str(raised.value)

    said = on_ranks(3, body)
    assert "ranks 2 and 0 differ: threads 2, and 1 here" in said[0]
    assert "OMP_NUM_THREADS" in said[0]


def run(digits, folder, *more):
    packs = [f"data.train={digits / 'low-train.h5'}", f"data.val={digits / 'low-test.h5'}", f"folder={folder}"]
    steps = ["schedule.epochs=null", "schedule.warmup_steps=1", "train.micro_batch=16", "schedule.milestones=[]"]
    pretrain.pretrain(load(PretrainConfig, "demo", [*packs, *steps, *more], "pretrain"), Communicator(Launch("alone")))


def test_a_run_goes_on_only_as_it_was_computed(digits, tmp_path, switches_as_before):
    torch.set_num_threads(1)
    audit = "train.reproducible=true"
    run(digits, tmp_path / "run", audit, "schedule.steps=2")
    run(digits, tmp_path / "run", audit, "schedule.steps=3")
    with pytest.raises(UserError, match="step-00000003 was trained otherwise: micro_batch 16, and 32 here"):
        run(digits, tmp_path / "run", audit, "schedule.steps=4", "train.micro_batch=32")
    torch.set_num_threads(2)
    with pytest.raises(UserError, match="threads 1, and 2 here.*OMP_NUM_THREADS"):
        run(digits, tmp_path / "run", audit, "schedule.steps=4")
    run(digits, tmp_path / "run", "schedule.steps=4")  # nobody asks for the bits any more
    with pytest.raises(UserError, match="step-00000004 was trained without reproducible=true"):
        run(digits, tmp_path / "run", audit, "schedule.steps=5")
