"""What a fine-tuning run is put together from: the settings of the published code against its formulas."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_sample_weight

from engine import finetune
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.config.data import TargetConfig
from engine.config.loading import load
from engine.config.schema import FinetuneConfig, RuleConfig
from engine.transfer import hyperrule
from engine.transfer import plan as transfer
from loaders.errors import UserError
from loaders.pipelines.transform import Affine

RANDOM = ("from=random", "model=R8x0.25-8px")


def configured(digits, *settings, recipe="demo"):
    packs = [f"data.train={digits / 'high-train.h5'}", f"data.test={digits / 'high-test.h5'}"]
    return load(FinetuneConfig, recipe, [*packs, *RANDOM, *settings], "finetune")


def settled(digits, *settings, recipe="demo"):
    """The parts of a run that is not started."""
    return transfer.finetuning(configured(digits, *settings, recipe=recipe), Communicator(Launch("alone")))


def published_rate(step, lr, warmup, milestones):
    """The facts, with steps counted from 1: warm-up begins at lr / K, and a milestone acts one step later."""
    if step <= warmup:
        return lr * step / warmup
    return lr * 0.1 ** sum(step > milestone + 1 for milestone in milestones)


@pytest.mark.parametrize("steps", [None, 50])
def test_warm_up_and_milestones_may_be_as_in_the_published_code(digits, steps):
    share = 1 if steps is None else steps / 500
    settings = ["rule.steps=null" if steps is None else f"rule.steps={steps}", "lr=0.001"]
    _, exact = settled(digits, *settings)
    _, published = settled(digits, *settings, "rule.timing=published")
    milestones = [round(share * step) for step in (200, 300, 400)]
    warmup = round(100 * share)
    rates = [published.times.learning_rate(step) for step in range(published.times.total_steps)]
    expected = [published_rate(step + 1, 0.001, warmup, milestones) for step in range(len(rates))]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)
    assert rates[0] == pytest.approx(0.001 / warmup)
    assert exact.times.learning_rate(0) == 0
    assert exact.times.learning_rate(milestones[0]) == pytest.approx(1e-4)
    assert published.times.learning_rate(milestones[0]) == pytest.approx(1e-3)


def test_a_new_head_is_zero_or_as_pytorch_makes_it(digits):
    zero, default = (settled(digits, f"head={head}")[0].model.head.conv for head in ("zero", "default"))
    assert not zero.weight.any()
    assert not zero.bias.any()
    bound = default.weight[0].numel() ** -0.5  # of torch.nn.Conv2d: uniform in ±1 / √fan-in
    for values in (default.weight, default.bias):
        assert 0.7 * bound < values.abs().max() <= bound
    default.requires_grad_(False)
    assert default.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not torch.equal(settled(digits, "head=default", "seed=1")[0].model.head.conv.weight, default.weight)


def test_evaluations_on_the_way_change_no_result(digits, tmp_path):
    lines = []
    for number, settings in enumerate(([], ["eval_every=5"])):
        folder = tmp_path / str(number)
        config = configured(
            digits, "shots=1", "rule.steps=12", f"folder={folder}", f"results={tmp_path / 'r.jsonl'}", *settings
        )
        lines.append(finetune.finetune(config, Communicator(Launch("alone")), quiet=True))
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [event["step"] for event in events if event["kind"] == "val"] == ([12], [5, 10, 12])[number]
    assert lines[0]["metric_value"] == lines[1]["metric_value"]
    assert lines[0]["settings"] == lines[1]["settings"]


def test_a_share_of_the_training_images_is_scored_on_in_the_place_of_a_test_set(digits):
    packs = [f"data.train={digits / 'high-train.h5'}", "data.test=null", "data.holdout=0.3"]
    config = load(FinetuneConfig, "demo", [*packs, *RANDOM, "shots=50%"], "finetune")
    parts, plan = transfer.finetuning(config, Communicator(Launch("alone")))
    labels, feed = parts.feed.train.labels, parts.feed
    counts = np.bincount(labels)
    assert np.bincount(labels[feed.tested]) == pytest.approx(0.3 * counts, abs=1)
    assert np.bincount(labels[feed.plan.pool]) == pytest.approx(0.35 * counts, abs=1)
    assert not set(feed.tested) & set(feed.plan.pool)
    assert plan.dataset == "high_holdout"  # not to be taken for a result on the test set
    scored = np.concatenate([batch.ids[batch.valid].numpy() for batch in feed.test_batches()])
    assert sorted(scored) == feed.tested.tolist()


def test_what_to_score_on_is_said_once(digits):
    train = f"data.train={digits / 'high-train.h5'}"
    for words, said in (
        (["data.test=null"], "data.holdout=0.2, or folds=5"),
        (["data.holdout=0.2"], "must say: data.test=…"),
        (["data.test=x.h5", "data.holdout=0.1"], "leave one away"),
        (["data.test=null", "data.holdout=1"], "less than 1"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            load(FinetuneConfig, "demo", [train, *RANDOM, *words], "finetune")
    with pytest.raises(UserError, match=re.escape("nothing to train on, or to score on")):
        transfer.finetuning(
            load(FinetuneConfig, "demo", [train, *RANDOM, "data.test=null", "data.holdout=1e-6"], "finetune"),
            Communicator(Launch("alone")),
        )


def test_more_steps_may_go_on_at_the_last_rate(digits):
    _, longer = settled(digits, "rule.steps=700", "rule.stretch=false", "lr=0.001")
    _, rule = settled(digits, "rule.steps=null", "lr=0.001")
    assert longer.times.total_steps == 700
    rates = [longer.times.learning_rate(step) for step in range(700)]
    assert rates[:500] == [rule.times.learning_rate(step) for step in range(500)]
    assert rates[500:] == pytest.approx([1e-6] * 200)
    with pytest.raises(UserError, match="warm-up of 100 and 50 steps"):
        settled(digits, "rule.steps=50", "rule.stretch=false")


def test_weights_of_the_loss_are_scikit_learns(digits):
    parts, _ = settled(digits, "class_weights=balanced", "shots=full")
    labels = parts.feed.train.labels
    weights = compute_sample_weight("balanced", labels)
    logits = torch.randn(len(labels), 5)
    total, count = parts.objective.loss(logits, torch.from_numpy(labels))
    expected = log_loss(labels, logits.double().softmax(1), sample_weight=weights)
    assert (total / count).item() == pytest.approx(expected, rel=1e-5)
    assert settled(digits, "shots=full")[0].objective.loss(logits, torch.from_numpy(labels))[1].item() == len(labels)


def test_transforms_as_published(digits):
    large, small = (hyperrule.rule(1000, side, side) for side in (300, 32))
    natural = configured(digits, recipe="pets@published")
    train, test = transfer.transforms(natural, large, {})
    assert (train.kind, train.before_crop, train.size) == ("random_short_crop", 512, 480)
    assert (test.kind, test.size) == ("resize", 480)
    assert transfer.transforms(configured(digits, recipe="pets"), small, {})[0].kind == "random_crop"
    train, test = transfer.transforms(configured(digits, recipe="chexpert@published"), large, {})
    assert train.affine == Affine(45, (0.9, 1.1), 0.25, "reflect")
    assert (train.downscale, test.downscale) == ("area", "area")
    train, test = transfer.transforms(configured(digits, recipe="chexpert"), large, {})
    assert train.affine == Affine(45, (0.9, 1.1), 0.15, "black")
    assert (train.downscale, test.downscale) == ("linear", "linear")


SMALL, LARGE = hyperrule.rule(100, 32, 32), hyperrule.rule(600_000, 300, 300)  # 160 and 128, 512 and 480 pixels
HALF = (0.5, 0.5, 0.5)
PRETRAINED = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.6, 0.8]}


def settings_of(batch=128, lr=0.003, steps=None, **data):
    data = TargetConfig(train="a.h5", test="b.h5", **data)
    return FinetuneConfig(name="x", from_="a", batch=batch, lr=lr, data=data, rule=RuleConfig(steps=steps))


@pytest.mark.parametrize(
    ("decided", "data", "expected"),
    [
        (SMALL, {}, (128, 160)),
        (LARGE, {}, (480, 512)),
        (SMALL, {"size": 64}, (64, 80)),  # in the rule's proportion
        (LARGE, {"size": 96}, (96, 102)),
        (SMALL, {"size": 64, "resize": 64}, (64, 64)),
        (SMALL, {"resize": 200}, (128, 200)),
    ],
)
def test_sizes_are_the_rules_unless_given(decided, data, expected):
    train, test = transfer.transforms(settings_of(**data), decided, {})
    assert (train.kind, train.size, train.before_crop) == ("random_crop", *expected)
    assert (test.kind, test.size, test.before_crop) == ("resize", expected[0], expected[0])
    assert (train.flip, test.flip) == (True, False)


def test_nothing_can_be_cropped_out_of_less():
    with pytest.raises(UserError, match="data.resize=63 is less than the size of 64"):
        transfer.transforms(settings_of(size=64, resize=63), SMALL, {})


@pytest.mark.parametrize(("size", "expected"), [(None, 224), (64, 64)])
def test_x_rays_are_not_cropped(size, expected):
    train, test = transfer.transforms(settings_of(augment="xray", size=size, flip=False), LARGE, {})
    assert (train.kind, train.size, test.kind, test.size) == ("xray", expected, "xray", expected)
    assert train.affine is not None and test.affine is None
    assert (train.flip, test.flip) == (False, False)


@pytest.mark.parametrize(
    ("normalize", "about", "mean", "std"),
    [
        ("auto", PRETRAINED, (0.1, 0.2, 0.3), (0.4, 0.6, 0.8)),
        ("auto", {}, HALF, HALF),
        ("half", PRETRAINED, HALF, HALF),
        ("imagenet", PRETRAINED, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_pixels_are_normalized_as_in_pre_training_where_that_is_known(normalize, about, mean, std):
    for augment in ("crop", "xray"):
        for each in transfer.transforms(settings_of(normalize=normalize, augment=augment), SMALL, about):
            assert (each.mean, each.std) == (mean, std)


def test_the_schedule_is_the_rules_or_as_long_as_asked_in_proportion():
    times = transfer._times(settings_of(batch=50, lr=0.007), LARGE, samples=1000)
    assert (times.total_steps, times.warmup_steps, times.milestones) == (20_000, 500, (6_000, 12_000, 18_000))
    assert (times.kind, times.peak, times.factor, times.steps_per_epoch) == ("step", 0.007, 0.1, 20.0)
    times = transfer._times(settings_of(steps=50), SMALL, samples=1000)
    assert (times.total_steps, times.warmup_steps, times.milestones) == (50, 10, (20, 30, 40))
    times = transfer._times(settings_of(steps=2), replace(SMALL, milestones=(100, 200, 300, 400)), samples=1000)
    assert times.milestones == (1, 2)  # those that come together are one, and none is at the start
    assert math.isclose(times.learning_rate(1), 0.003 * 0.1)
