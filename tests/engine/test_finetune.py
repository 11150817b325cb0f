import io
import json
import math
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bench.paper.names import read_layout
from engine import finetune, predicting, pretrain
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.config.loading import load
from engine.config.schema import PretrainConfig
from engine.network import bit, weights
from engine.saving import checkpoint
from engine.training.hooks import Evaluate
from engine.training.run import build_trainer
from engine.training.trainer import Trainer
from engine.transfer import fewshot, hyperrule, record, results
from engine.transfer import plan as transfer
from loaders.packs import holdout
from loaders.packs.shard import Pack
from loaders.packs.writer import Record, ShardWriter, new_attributes
from loaders.pipelines.batches import Batch
from tests.support.pictures import encoded


@pytest.fixture(scope="module")
def pretrained(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    settings = [f"data.train={digits / 'low-train.h5'}", f"data.val={digits / 'low-test.h5'}", f"folder={folder}"]
    config = load(PretrainConfig, "demo", [*settings, "schedule.epochs=10"], "pretrain")
    pretrain.pretrain(config, Communicator(Launch("alone")))
    return folder


def tune(digits, tmp_path, code, *settings):
    packs = [f"data.train={digits / 'high-train.h5'}", f"data.test={digits / 'high-test.h5'}"]
    with pytest.raises(SystemExit) as ended:
        finetune.main(["demo", *packs, f"results={tmp_path / 'results.jsonl'}", *settings])
    assert ended.value.code == code
    results = tmp_path / "results.jsonl"
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def test_a_result_line_has_the_published_columns_and_what_identifies_the_run(digits, pretrained, tmp_path):
    (line,) = tune(digits, tmp_path, 0, f"from={pretrained}", "shots=5", "seed=3", "rule.steps=20")
    published = {"metric_value", "path", "seed", "shot", "pretrained_model", "dataset", "last_step"}
    assert published <= set(line)
    assert (line["seed"], line["shot"], line["pretrained_model"], line["metric"]) == (3, "5", "demo", "top1")
    assert (line["train_images"], line["test_images"], line["last_step"]) == (25, 269, 20)
    assert line["network"] == "R8x0.25-8px"
    assert line["interval"][0] <= line["metric_value"] <= line["interval"][1]
    sizes = np.bincount(Pack.open(digits / "high-test.h5").labels)
    found = np.array([line["classes"][str(digit)] for digit in range(5, 10)])
    assert (found * sizes).sum() / sizes.sum() == pytest.approx(line["metric_value"])
    labels = Pack.open(digits / "high-test.h5").labels.tolist()
    assert line["majority"] == pytest.approx(100 * max(map(labels.count, labels)) / len(labels))
    assert line["weights"] == weights.digest(load_file(checkpoint.find(pretrained) / checkpoint.WEIGHTS))


def test_checkpoints_tuned_by_one_recipe_in_different_folders_are_different_sources(digits, tmp_path):
    """All are of the recipe `demo`; each is called by its run's folder, and where that is one name, told apart."""
    places = [tmp_path / "a", tmp_path / "b", tmp_path / "other" / "a"]
    for steps, place in enumerate(places, 2):
        common = ["from=random", "model=R8x0.25-8px", "shots=2", f"rule.steps={steps}"]
        tune(digits, tmp_path / "first", 0, f"folder={place}", *common)
    lines = tune(digits, tmp_path, 0, f"from={','.join(map(str, places))}", "shots=2", "rule.steps=2")
    assert [line["pretrained_model"] for line in lines] == ["a", "b", "a"]
    first, second, third = (line["weights"] for line in lines)
    assert len({first, second, third}) == 3
    found = {(result.source, result.value) for result in results.read([tmp_path / "results.jsonl"])}
    expected = (f"a [{first}]", "b", f"a [{third}]")
    assert found == {(name, line["metric_value"]) for name, line in zip(expected, lines, strict=True)}


def test_classes_scored_by_mean_auc(digits, tmp_path):
    """As PadChest-cl is: the AUC is the score, and top-1 stands beside it."""
    settings = ["from=random", "model=R8x0.25-8px", "shots=20", "rule.steps=30", "data.metric=mean_auc"]
    (line,) = tune(digits, tmp_path, 0, *settings)
    assert (line["metric"], line["auc_classes"]) == ("mean_auc", 5)
    assert line["metric_value"] > line["test_top1"] > 20


def test_label_vectors_of_two_packs_are_tuned_and_scored_by_what_is_known(tmp_path, capsys):
    """Two sets with different labels, of which they share two; one of the two has no negative in the test set."""
    rng = np.random.RandomState(0)
    sets = {"one": ["bright", "left", "always"], "two": ["always", "bright", "other"], "test": ["bright", "always"]}
    for name, labels in sets.items():
        (attributes,) = new_attributes({"source": "made up", "kind": "test"}, 1)
        with ShardWriter(tmp_path / f"{name}.h5", labels, attributes) as writer:
            for i in range(60):
                bright = i % 2
                pixels = (rng.rand(8, 8) * 100 + 150 * bright).clip(0, 255).astype(np.uint8)
                values = {"bright": float(bright) if rng.rand() < 0.8 else float("nan"), "always": 1.0}
                row = [values.get(label, float("nan")) for label in labels]
                writer.add(Record(encoded(Image.fromarray(pixels), "PNG"), f"{name} {i}", row, 8, 8))
            writer.finish()
            writer.publish()
    with pytest.raises(SystemExit) as ended:
        finetune.main(["demo", "from=random", "model=R8x0.25-8px", f"data.test={tmp_path / 'test.h5'}",
                       f"data.train=[{tmp_path / 'one.h5'},{tmp_path / 'two.h5'}]", "rule.steps=60",
                       f"results={tmp_path / 'results.jsonl'}"])  # fmt: skip
    assert ended.value.code == 0
    (line,) = [json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert (line["metric"], line["auc_classes"], line["dataset"]) == ("mean_auc", 1, "one+two")
    assert line["metric_value"] > 95  # brightness is easy
    said = capsys.readouterr().out
    assert "1 of 2 labels have no AUC" in said and "only one value of them: always" in said


def test_the_weights_that_are_named_are_the_weights_that_are_tuned(digits, pretrained, tmp_path):
    """Ten examples of each digit that pre-training knew already teach the new head at once; random weights not."""
    packs = [f"data.train={digits / 'low-train.h5'}", f"data.test={digits / 'low-test.h5'}"]
    settings = [*packs, "model=R8x0.25-8px", "shots=10", "lr=0.01", "rule.steps=40"]
    known, random = tune(digits, tmp_path, 0, f"from={pretrained},random", *settings)
    assert (known["pretrained_model"], random["pretrained_model"]) == ("demo", "random")
    assert known["metric_value"] > 85
    assert known["metric_value"] > random["metric_value"] + 10


def test_the_same_seed_gives_the_same_result(digits, pretrained, tmp_path):
    lines = tune(digits, tmp_path, 0, f"from={pretrained}", "shots=5", "seed=1,1,2", "rule.steps=20")
    assert lines[0]["test_loss"] == lines[1]["test_loss"] != lines[2]["test_loss"]


def test_only_the_drawn_shots_are_trained_on(digits, pretrained):
    config = load(
        finetune.FinetuneConfig,
        "demo",
        [f"from={pretrained}", "shots=2", "seed=4", f"data.train={digits / 'high-train.h5'}",
         f"data.test={digits / 'high-test.h5'}"],
        "finetune",
    )  # fmt: skip
    parts, plan = transfer.finetuning(config, Communicator(Launch("alone")))
    drawn = fewshot.draw(Pack.open(digits / "high-train.h5").labels, "2", 4)
    seen = torch.cat([batch.ids for step in parts.feed.train_batches(0, 5) for batch in step])
    assert set(seen.tolist()) == set(drawn.tolist())
    assert plan.train_images == 10


def settled(digits, *settings):
    """The parts of a run that is not started."""
    packs = [f"data.train={digits / 'high-train.h5'}", f"data.test={digits / 'high-test.h5'}"]
    return transfer.finetuning(load(finetune.FinetuneConfig, "demo", [*packs, *settings], "finetune"),
                               Communicator(Launch("alone")))  # fmt: skip


def test_pixels_are_normalized_as_in_pre_training(digits, pretrained):
    imagenet, half = (0.485, 0.456, 0.406), (0.5, 0.5, 0.5)  # the demo pre-trains with ImageNet's
    random = ("from=random", "model=R8x0.25-8px")
    for settings, mean in (
        ((f"from={pretrained}",), imagenet),
        (random, half),
        ((f"from={pretrained}", "data.normalize=half"), half),
        ((*random, "data.normalize=imagenet"), imagenet),
    ):
        parts, _ = settled(digits, "shots=1", *settings)
        assert parts.feed.train_transform.mean == parts.feed.test_transform.mean == mean
        assert tuple(parts.about["mean"]) == mean


def test_classes_are_balanced_with_all_images_only(digits):
    labels = Pack.open(digits / "high-train.h5").labels
    most = np.bincount(labels).max()
    for shots, expected in (("full", [most] * 5), ("3", [3] * 5)):
        parts, plan = settled(digits, "from=random", "model=R8x0.25-8px", "data.oversample=true", f"shots={shots}")
        assert np.bincount(labels[parts.feed.plan.pool]).tolist() == expected
        assert plan.train_images == (len(labels) if shots == "full" else 15)  # the rule counts distinct images


@pytest.mark.parametrize(
    ("recipe", "augment", "metric", "oversample"),
    [("cifar10", "crop", "auto", False), ("cifar100", "crop", "auto", False), ("flowers102", "crop", "auto", True),
     ("pets", "crop", "auto", False), ("covidx", "crop", "auto", True), ("tuberculosis", "crop", "auto", False),
     ("chexpert", "xray", "auto", False), ("mimic", "xray", "auto", False), ("nih", "xray", "auto", False),
     ("padchest", "xray", "auto", False), ("padchest_cl", "xray", "mean_auc", False)],
)  # fmt: skip
def test_targets_of_the_protocol(recipe, augment, metric, oversample):
    """Batch, rate, momentum, decay, clipping, transform, oversampling, and metric of each published target."""
    config = load(finetune.FinetuneConfig, recipe, ["from=x", "data.train=a", "data.test=b"], "finetune")
    assert (config.batch, config.lr, config.shots, config.rule.steps) == (128, 0.001, "full", None)
    assert (config.optim.momentum, config.optim.nesterov, config.optim.weight_decay) == (0.9, True, 0)
    assert (config.optim.clipping, config.optim.eps) == (0.01, 1e-3)
    assert (config.data.name, config.data.augment, config.data.metric) == (recipe, augment, metric)
    assert config.data.oversample == oversample
    train, test = transfer.transforms(config, hyperrule.rule(50_000, 300, 300), {})
    assert (test.size, train.before_crop) == ((224, 224) if augment == "xray" else (480, 512))
    small, test = transfer.transforms(config, hyperrule.rule(50_000, 32, 32), {})
    assert (test.size, small.before_crop) == ((224, 224) if augment == "xray" else (128, 160))
    assert small.flip


def test_flowers_has_its_official_split_and_its_higher_rate_as_variants():
    def variant(name):
        return load(finetune.FinetuneConfig, f"flowers102{name}", ["from=x", "data.train=a", "data.test=b"], "finetune")

    plain, official, high = variant(""), variant("@official"), variant("@high_lr")
    assert (plain.lr, official.lr, high.lr) == (0.001, 0.001, 0.01)
    assert [one.data.oversample for one in (plain, official, high)] == [True, False, True]
    # Results of another split or rate must not be taken for those of the recipe, in the file or in its tables.
    known = read_layout()
    names = [one.data.name for one in (plain, official, high)]
    assert [known.target(name).name == "flowers102" for name in names] == [True, False, False]


def test_a_tuned_network_is_kept_where_a_folder_is_given(digits, pretrained, tmp_path):
    settings = [f"from={pretrained}", "shots=5", "rule.steps=20", f"folder={tmp_path / 'tuned'}"]
    (line,) = tune(digits, tmp_path, 0, *settings)
    assert line["path"] == str(tmp_path / "tuned")
    again = tune(digits, tmp_path, 0, f"from={tmp_path / 'tuned'}", "shots=5", "rule.steps=20")
    assert len(again) == 2
    assert (tmp_path / "tuned" / "curves.png").exists()


def kept(digits, tmp_path, *settings):
    """The folder of a run that was given none."""
    return tune(digits, tmp_path, 0, "from=random", "model=R8x0.25-8px", "shots=2", "rule.steps=2", *settings)[-1][
        "path"
    ]


def test_a_tuned_network_is_kept_beside_the_results_where_nothing_is_said(digits, tmp_path, capsys):
    first = kept(digits, tmp_path)
    assert f"the tuned network is in {first}" in capsys.readouterr().out
    assert os.path.dirname(first) == str(tmp_path) and os.path.basename(first).startswith("high-train-2-0-")
    (line,) = [json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert predicting.load(first).result == line
    assert kept(digits, tmp_path) == first  # and nothing is trained
    assert "goes on from" in (said := capsys.readouterr().out) and "step 2 of 2" in said
    others = [kept(digits, tmp_path, "seed=1"), kept(digits, tmp_path, "lr=0.5"),
              kept(digits, tmp_path, f"data.test={digits / 'high-train.h5'}", "data.overlap=allow")]  # fmt: skip
    assert len({first, *others}) == 4
    assert kept(digits, tmp_path, "graph=off", "data.name=high-train") != ""


def test_other_images_of_the_same_name_make_another_run(digits, tmp_path):
    """What is kept of one is not taken for the other's."""
    for part in ("train", "test"):
        shutil.copy(digits / f"high-{part}.h5", tmp_path / f"{part}.h5")
    packs = [f"data.{part}={tmp_path / f'{part}.h5'}" for part in ("train", "test")]
    first = kept(digits, tmp_path, *packs)
    for part in ("train", "test"):
        shutil.copy(digits / f"low-{part}.h5", tmp_path / f"{part}.h5")
    assert kept(digits, tmp_path, *packs) != first


def test_nothing_is_kept_where_that_is_said(digits, tmp_path, capsys):
    assert kept(digits, tmp_path, "folder=null") == ""
    assert os.listdir(tmp_path) == ["results.jsonl"]
    assert "not kept, since folder=null" in capsys.readouterr().out


@pytest.mark.parametrize("metric", ["auto", "mean_auc"])
def test_an_accuracy_stands_beside_that_of_the_largest_class_and_what_was_never_said(digits, tmp_path, capsys, metric):
    """After one step: each image by itself says what is never said."""
    settings = ["from=random", "model=R8x0.25-8px", "shots=2", "rule.steps=1", f"data.metric={metric}"]
    (line,) = tune(digits, tmp_path, 0, *settings)
    pack = Pack.open(digits / "high-test.h5")
    labels, network = pack.labels, predicting.load(line["path"]).network
    images = np.stack([np.asarray(Image.open(io.BytesIO(pack.record(i).tobytes())).convert("RGB")) for i in range(269)])
    said_to_be = network(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).argmax(1).unique().tolist()
    never = [name for number, name in enumerate("56789") if number not in said_to_be]
    said = capsys.readouterr().out
    assert line["never_predicted"] == never != []
    assert f"never predicted, though the test set has them: {', '.join(never)}" in said
    largest = 100 * np.bincount(labels).max() / len(labels)
    assert f"always saying the most frequent class of the test set: top-1 {largest:.2f}%" in said


def test_a_share_of_what_is_trained_on_is_validated_on(digits, tmp_path, capsys):
    config = ["from=random", "model=R8x0.25-8px", "data.val=0.25"]
    parts, plan = settled(digits, *config)
    labels = Pack.open(digits / "high-train.h5").labels
    trained, chosen = parts.feed.plan.pool, parts.feed.test_ids
    assert sorted([*trained, *chosen]) == list(range(len(labels)))
    shares = np.bincount(labels[chosen], minlength=10) / np.maximum(np.bincount(labels, minlength=10), 1)
    np.testing.assert_allclose(shares[np.unique(labels)], 0.25, atol=0.02)
    assert len(plan.scored.test) == 269 and plan.scored.test_ids is None  # the score is of data.test
    both, _ = settled(digits, *config, "data.test=null", "data.holdout=0.2")
    held = holdout.parts(Pack.open(digits / "high-train.h5"), 0.2)[1]
    assert not {*both.feed.plan.pool, *both.feed.test_ids} & {*held}
    assert len(both.feed.plan.pool) + len(both.feed.test_ids) + len(held) == len(labels)
    (line,) = tune(digits, tmp_path, 0, *config, "shots=5", "rule.steps=4", "eval_every=2", "keep_best=true")
    assert line["scored_step"] in (2, 4) and line["test_images"] == 269
    configs = [load(finetune.FinetuneConfig, "demo", [*config[:2], "data.train=a", "data.test=b", *more], "finetune")
               for more in ([], ["data.val=0.25"], ["data.val=0.1"], ["data.val=c.h5"])]  # fmt: skip
    prints = [record.fingerprint(each) for each in configs]
    assert len({*prints[:3]}) == 3 and prints[3] == prints[0]  # a pack only looks on
    spelled = replace(configs[1], data=replace(configs[1].data, val=0.25))  # as YAML has it
    assert record.fingerprint(spelled) == prints[1]


def test_folds_are_scored_in_turn(digits, tmp_path, capsys):
    words = ["from=random", "model=R8x0.25-8px", "rule.steps=30", "folds=3", "data.test=null", "lr=1"]
    lines = tune(digits, tmp_path, 0, *words)
    assert [line["dataset"] for line in lines] == [f"high_fold{fold}of3" for fold in range(3)]
    pack = Pack.open(digits / "high-train.h5")
    assert sum(line["test_images"] for line in lines) == len(pack)
    scores = [line["metric_value"] for line in lines]
    assert f"3 folds: top1 {np.mean(scores):.2f} ± {np.std(scores, ddof=1):.2f}%" in capsys.readouterr().out
    assert len({line["path"] for line in lines}) == 3
    *_, again = tune(digits, tmp_path, 0, *words, "fold=1", f"folder={tmp_path / 'one'}")
    assert (again["metric_value"], again["dataset"]) == (scores[1], "high_fold1of3")
    tune(digits, tmp_path, 0, *words, "rule.steps=1", f"folder={tmp_path / 'all'}")
    assert sorted(os.listdir(tmp_path / "all")) == ["fold-0", "fold-1", "fold-2"]


def test_mixup_mixes_images_and_labels_by_the_same_share():
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 3])
    images = torch.nn.functional.one_hot(labels, 4).float()[:, :, None, None].expand(4, 4, 2, 2)
    batch = Batch(images, labels, labels, labels >= 0)
    before = Batch(images.flip(0), labels.flip(0), labels.flip(0), labels >= 0)
    mixed, targets = transfer.mixer(0.8, seed=0, num_classes=4)(5, batch, before)
    torch.testing.assert_close(mixed[:, :, 0, 0], targets)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert (targets.max(1).values < 1).any()
    again, _ = transfer.mixer(0.8, seed=0, num_classes=4)(5, batch, before)
    assert torch.equal(mixed, again)
    other, _ = transfer.mixer(0.8, seed=0, num_classes=4)(6, batch, before)
    assert not torch.equal(mixed, other)


def mixed_by(digits, first, steps, ranks, accumulate):
    """What the network is shown in some steps, in the order of the global batch: the ranks one after the other."""
    words = ["from=random", "model=R8x0.25-8px", "rule.mixup=0.3", "rule.steps=9", "batch=24", "seed=3",
             f"accumulate={accumulate}", "data.backend=host"]  # fmt: skip
    packs = [f"data.train={digits / 'high-train.h5'}", f"data.test={digits / 'high-test.h5'}"]
    config = load(finetune.FinetuneConfig, "demo", [*packs, *words], "finetune")
    shown = {step: [] for step in range(first, first + steps)}
    for rank in range(ranks):
        run, plan = finetune.finetuning(config, Communicator(Launch("test", rank, ranks)))

        def mix(step, *batches, plan=plan):
            images, targets = plan.mix(step, *batches)
            shown[step].append(torch.cat([images.flatten(1), targets], 1))
            return images, targets

        trainer = build_trainer(replace(run, mix=mix), Communicator(Launch("alone")), first, [])
        for _ in range(steps):
            trainer.train_step(next(trainer.batches))
    return [torch.cat(parts) for parts in shown.values()]


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (3, 1), (1, 4), (2, 3), (24, 1)])
def test_mixup_does_not_depend_on_the_number_of_ranks_or_on_where_a_run_began(digits, ranks, accumulate):
    whole = mixed_by(digits, 0, 4, 1, 1)
    assert torch.equal(torch.cat(mixed_by(digits, 2, 2, ranks, accumulate)), torch.cat(whole[2:]))
    assert torch.equal(mixed_by(digits, 0, 1, ranks, accumulate)[0], whole[0])
    targets = torch.cat(whole)[:, -5:]
    assert (targets.sum(1) - 1).abs().max() < 1e-6
    assert (targets.max(1).values < 1).any()


ONE_LINE = {
    "folds and a test pack": (["folds=3"], "data.test and folds both say what to score on"),
    "folds and a held-out share": (
        ["folds=3", "data.test=null", "data.holdout=0.2"],
        "data.holdout and folds both say",
    ),
    "nothing to score on": (["data.test=null"], "leaves open what to score on"),
    "a fold beyond the last": (["folds=3", "fold=3", "data.test=null"], "fold=3 of folds=3"),
    "a fold of none": (["fold=0"], "fold=0 of folds=null"),
    "more folds than images": (["folds=1000", "data.test=null", "fold=0"], "some would be empty"),
    "a validation share of all": (["data.val=1"], "data.val=1: must be a pack"),
    "a negative validation share": (["data.val=-0.5"], "data.val=-0.5: must be a pack"),
    "a validation share of next to nothing": (["data.val=1e-9"], "data.val=1e-09 of 627 images leaves nothing"),
}


def bad(what, digits, pretrained, tmp_path):
    """Settings of a bad input, and what the message must say."""
    if what == "from nothing":
        return [], "from=…"
    if what == "from empty":
        return ["from="], "from="
    if what == "from missing":
        return [f"from={tmp_path / 'absent'}"], "absent"
    if what == "random without a network":
        return ["from=random"], "model=…"
    if what == "checkpoint of another network":
        return [f"from={pretrained}", "model=R11x0.25-32px"], "R11x0.25-32px"
    if what == "not a checkpoint":
        (tmp_path / "weights.pth").write_text("hello")
        return [f"from={tmp_path / 'weights.pth'}"], "weights.pth"
    if what == "unnamed network":
        save_file({"a": torch.zeros(3)}, tmp_path / "odd.safetensors")
        return [f"from={tmp_path / 'odd.safetensors'}"], "odd.safetensors"
    if what == "shots":
        return [f"from={pretrained}", "shots=-1"], "shots"
    if what == "missing test pack":
        return [f"from={pretrained}", "data.test=absent.h5"], "absent.h5"
    if what == "test pack of other classes":
        return [f"from={pretrained}", f"data.test={digits / 'low-test.h5'}"], "classes"
    if what == "test on what is trained on":
        return [f"from={pretrained}", f"data.test={digits / 'high-train.h5'}", "shots=1"], "data.test are in data.train"
    if what == "validation on what is trained on":
        return [f"from={pretrained}", f"data.val={digits / 'high-train.h5'}", "shots=1"], "data.val are in data.train"
    if what == "results that cannot be written":
        return [f"from={pretrained}", "results=/proc/nowhere/x.jsonl"], "x.jsonl cannot be written"
    if what == "one folder for several runs":
        return [f"from={pretrained}", "seed=0,1", f"folder={tmp_path / 'run'}"], "each over the one before"
    if what == "no pack":
        return [f"from={pretrained}", "data.train=5"], "there is no pack at 5"
    if what == "a pack twice":
        twice = ",".join([str(digits / "high-train.h5")] * 2)
        return [f"from={pretrained}", f"data.train=[{twice}]"], "named twice"
    if what == "momentum":
        return [f"from={pretrained}", "optim.momentum=-1"], "optim.momentum=-1"
    if what == "a resize below the size":
        return [f"from={pretrained}", "data.resize=4"], "data.resize=4"
    if what == "a best one by nothing":
        return [f"from={pretrained}", "keep_best=true", f"folder={tmp_path / 'run'}"], "needs data.val=…"
    if what in ONE_LINE:
        words, said = ONE_LINE[what]
        return [f"from={pretrained}", *words], said
    if what == "diverged":
        return [f"from={pretrained}", "lr=1e12", "rule.steps=20"], "training has diverged"
    raise AssertionError(what)


@pytest.mark.parametrize(
    "what",
    ["from nothing", "from empty", "from missing", "random without a network", "checkpoint of another network",
     "not a checkpoint", "unnamed network", "shots", "missing test pack", "test pack of other classes",
     "test on what is trained on", "validation on what is trained on",
     "results that cannot be written", "one folder for several runs", "no pack",
      "a pack twice", "momentum", "a resize below the size", "a best one by nothing", "diverged", *ONE_LINE],
)  # fmt: skip
def test_bad_input_ends_in_one_message(digits, pretrained, tmp_path, capsys, what):
    settings, said = bad(what, digits, pretrained, tmp_path)
    capsys.readouterr()
    assert tune(digits, tmp_path, 2, *settings) == []
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert said in message
    assert "Traceback" not in message


def test_an_official_network_is_recognised_by_its_weights(digits, tmp_path):
    """A file without a description, as the published ones are: which member it is shows in its tensors."""
    state = bit.build("R11x0.25-32px", 3).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "BiT.safetensors")
    settings = ["shots=1", "rule.steps=1", "data.size=32", "data.resize=36"]
    (line,) = tune(digits, tmp_path, 0, f"from={tmp_path / 'BiT.safetensors'}", *settings)
    assert (line["network"], line["pretrained_model"]) == ("R11x0.25-32px", "BiT.safetensors")


@pytest.mark.parametrize(
    ("left", "kept"), [("", 0), ('{"a": 1}\n', 1), ('{"a": 1}\n{"b', 1), ('{"b', 0), ('{"a": 1}', 1)]
)
def test_a_line_that_a_kill_cut_off_does_not_spoil_the_next(tmp_path, left, kept):
    path = tmp_path / "new" / "results.jsonl"
    path.parent.mkdir()
    path.write_text(left)
    record.append(path, {"c": 2})
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found == [{"a": 1}] * kept + [{"c": 2}]


def interrupted_at(monkeypatch, step, act):
    """Training in which `act` happens before a step."""
    whole = Trainer.train_step

    def breaks(self, micro_batches):
        if self.step == step:
            act()
        whole(self, micro_batches)

    monkeypatch.setattr(Trainer, "train_step", breaks)


def lost():
    raise OSError("node lost")


def tuned(folder):
    return load_file(checkpoint.find(folder) / checkpoint.WEIGHTS)


def test_fine_tuning_that_breaks_off_goes_on_as_if_it_never_had(digits, pretrained, tmp_path, monkeypatch):
    def words(name):
        return [f"from={pretrained}", "shots=5", "rule.steps=20", "rule.mixup=0.2", "checkpoint_every=4",
                f"folder={tmp_path / name}"]  # fmt: skip

    (whole,) = tune(digits, tmp_path, 0, *words("whole"))
    with monkeypatch.context() as patched:
        interrupted_at(patched, 14, lost)
        tune(digits, tmp_path, 2, *words("broken"))
    assert checkpoint.find(tmp_path / "broken").name == "step-00000012"
    *_, resumed = tune(digits, tmp_path, 0, *words("broken"))
    assert resumed["test_loss"] == whole["test_loss"]
    expected = tuned(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in tuned(tmp_path / "broken").items())
    *_, again = tune(digits, tmp_path, 0, *words("broken"))  # nothing is left to train, and it is scored all the same
    assert again["test_loss"] == whole["test_loss"]


def test_the_best_by_a_validation_pack_is_scored_also_after_breaking_off(digits, pretrained, tmp_path, monkeypatch):
    """Its losses are made up, so that the least one is in the middle, and before the step where the run breaks off."""
    said = dict(zip(range(4, 21, 4), (3.0, 1.0, math.nan, 2.0, 1.5), strict=True))
    monkeypatch.setattr(
        Evaluate, "evaluate", lambda self, trainer: setattr(self, "newest", {"loss": said[trainer.step]})
    )

    def words(name):
        return [f"from={pretrained}", "shots=5", "rule.steps=20", "rule.mixup=0.2", "checkpoint_every=4",
                "eval_every=4", "keep_best=true", f"data.val={digits / 'high-train.h5'}", "data.overlap=allow",
                f"folder={tmp_path / name}"]  # fmt: skip

    (whole,) = tune(digits, tmp_path, 0, *words("whole"))
    with monkeypatch.context() as patched:
        interrupted_at(patched, 14, lost)
        tune(digits, tmp_path, 2, *words("broken"))
    *_, resumed = tune(digits, tmp_path, 0, *words("broken"))
    assert (whole["scored_step"], whole["last_step"]) == (8, 20)
    assert all(resumed[key] == whole[key] for key in ("scored_step", "test_loss", "metric_value", "test_images"))
    best = tuned(tmp_path / "whole" / "best")
    assert any(not torch.equal(value, best[name]) for name, value in tuned(tmp_path / "whole").items())
    parts, plan = settled(digits, f"from={pretrained}", "shots=5")
    parts.model.load_state_dict(best)
    parts.broadcast(Communicator(Launch("alone")))
    assert parts.evaluate(Communicator(Launch("alone")))["loss"] == pytest.approx(whole["test_loss"], rel=1e-6)
    labels = Pack.open(digits / "high-test.h5").labels
    assert len(plan.scored.tested) == whole["test_images"] == len(labels)
    assert whole["majority"] == pytest.approx(100 * np.bincount(labels).max() / len(labels))  # not of data.val


def test_an_evaluation_on_the_way_changes_nothing(digits, pretrained, tmp_path):
    words = [f"from={pretrained}", "shots=5", "rule.steps=12", "data.backend=host"]
    (plain,) = tune(digits, tmp_path, 0, *words)
    val = [f"data.val={digits / 'high-train.h5'}", "data.overlap=allow"]
    *_, looked = tune(digits, tmp_path, 0, *words, "eval_every=5", *val, f"folder={tmp_path / 'run'}")
    assert all(looked[key] == plain[key] for key in ("test_loss", "test_images", "scored_step", "settings"))
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    images = len(Pack.open(digits / "high-train.h5"))
    assert {event["step"]: event["images"] for event in events if event["kind"] == "val"} == dict.fromkeys(
        (5, 10, 12), images
    )


def test_fine_tuning_stops_on_a_signal_and_goes_on(digits, pretrained, tmp_path, monkeypatch, capsys):
    words = [f"from={pretrained}", "shots=5", "rule.steps=30", f"folder={tmp_path / 'run'}"]
    with monkeypatch.context() as patched:
        interrupted_at(patched, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        tune(digits, tmp_path, 75, *words)
    assert "goes on from there" in capsys.readouterr().err
    stopped = checkpoint.describe(checkpoint.find(tmp_path / "run"))["step"]
    assert stopped == 9
    tune(digits, tmp_path, 0, *words)
    assert f"step {stopped} of 30" in capsys.readouterr().out


def test_a_folder_of_another_seed_is_not_gone_on_from(digits, pretrained, tmp_path, capsys):
    words = [f"from={pretrained}", "shots=5", "rule.steps=5", f"folder={tmp_path / 'run'}"]
    tune(digits, tmp_path, 0, *words)
    tune(digits, tmp_path, 2, *words, "seed=1")
    assert "is of another run" in capsys.readouterr().err


def test_a_dry_run_of_fine_tuning_writes_nothing(digits, pretrained, tmp_path, capsys):
    tune(digits, tmp_path, 0, "--dry-run", f"from={pretrained}", "shots=5", f"folder={tmp_path / 'run'}")
    assert "peak memory" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
