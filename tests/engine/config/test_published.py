"""Recipes and docs/transfer.md against the protocol's section "From the published files"."""

import csv
import functools
import re
from pathlib import Path

import pytest

from engine.config.loading import load, recipes
from engine.config.schema import FinetuneConfig, PretrainConfig
from engine.training import assemble
from engine.training.timetable import timetable
from engine.transfer.hyperrule import rule
from engine.transfer.plan import transforms
from loaders.pipelines.transform import Affine

ROOT = Path(__file__).parents[3]
# Words of the facts → rows of the tables in docs/transfer.md that answer them; none: answered by the recipes' names or
# the report of results. Each clause of the facts must have one of these words.
ANSWERED = {
    "19 configurations": (), "PadChest alone": (), "item | published": (), "X-ray, all 13": ("X-rays: batch",),
    "base rate 0.01 at 256": ("X-rays: rate",), "16 images on each of 64 GPUs": ("X-rays: batch",),
    "90 epochs, warm-up 15": ("X-rays: length, schedule",), "decay 1e-4": ("X-rays: decay",), "AMP": ("AMP",),
    "mean and std 0.5": ("X-rays: mean, std",), "plain SGD": ("ImageNet-1k R50x1",),
    "RandAugment": ("ImageNet-1k optimized (`imagenet1k_cosine_r50x1`)",),
    "ImageNet-21k R50x1": ("ImageNet-21k R50x1",),
    "no validation set": ("ImageNet-21k R50x1",), "checkpoint used for transfer": ("checkpoint used for transfer",),
    "seed | 42": ("seed",), "Fine-tuning: AGC-SGD": ("optimizer", "batch"),
    "evaluation every 100 steps": ("evaluation",), "fp32": ("precision",), "new head keeps": ("new head",),
    "short side of 512": ("images above the small-image limit",), "flowers_high_lr": ("`flowers_high_lr`",),
    "Warm-up begins": ("warm-up",), "milestones act": ("milestones",),
    "Options of its program": ("share of the training set", "share held out for validation", "class weights",
                               "number of steps with a constant last rate", "resume", "timm networks"),
    "valid.csv": ("CheXpert",), "train.csv": ("CheXpert",), "MIMIC-CXR validate": ("MIMIC-CXR",), "NIH": ("NIH",),
    "COVIDx CXR-2": ("COVIDx CXR-2",), "Pets 3,669": ("Pets",), "PadChest-cl by image": ("PadChest, PadChest-cl",),
    "Flowers-102": ("Flowers-102",), "6,149": ("Flowers-102",), "2,040": ("Flowers-102",),
    "outside of a warped image": ("X-rays: outside of a warped image",),
    "downscaling by area": ("X-rays: downscaling",),
    "Support Devices": ('CheXpert: "Support Devices" where "No Finding" = 1',),
    "MixUp of label vectors": ("MixUp of label vectors",), "Result files": (), "the column": (), "90 places": (),
}  # fmt: skip
PACKS = ["data.train=train.h5", "data.val=val.h5"]


@pytest.fixture(scope="module")
def facts(shared):
    text = (shared / "reference" / "protocol.md").read_text()
    return text.partition("## From the published files")[2].partition("\n## ")[0]


@pytest.fixture(scope="module")
def table():
    """Item → cells of its row, of the tables of differences in docs/transfer.md."""
    text = (ROOT / "docs" / "transfer.md").read_text().partition("## The published study, item by item")[2]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    return {row[0].strip(): row[1:] for row in rows}


def pretraining(name):
    return load(PretrainConfig, name, PACKS, "pretrain")


def tuning(name):
    return load(FinetuneConfig, name, ["from=x", "data.train=a", "data.test=b"], "finetune")


def test_every_fact_has_a_row_that_says_same_or_differs(facts, table):
    clauses = [one.strip() for one in re.split(r"; |\. |\n", facts.partition("\n")[2]) if re.search(r"\w{3}", one)]
    assert len(clauses) > 30
    for clause in clauses:
        assert any(word in clause for word in ANSWERED), f"no row answers: {clause}"
    for word, rows in ANSWERED.items():
        assert word in facts, f"the facts no longer say: {word}"
        for row in rows:
            assert row in table, f"docs/transfer.md has no row {row!r}"
    kinds = [cells[-1] for cells in table.values() if len(cells) == 3 and cells[0] != "published"]
    assert len(kinds) > 35
    for verdict in kinds:
        assert re.match(r"(same|differs|own recipe|followed by setting)", verdict.strip()), verdict


def test_variants_and_recipes_that_the_table_names_exist(table):
    text = " ".join(" ".join(cells) for cells in table.values())
    for name in re.findall(r"`(\w+@\w+)`", text):
        tuning(name)
    for name in re.findall(r"`(imagenet\w+)`", text):
        assert name in recipes("pretrain")
    for name in [name for name in recipes("pretrain") if name not in ("demo", "cifar10_small")]:
        exact = pretraining(f"{name}@published")
        assert (exact.train.precision, exact.train.seed) == ("fp16", 42)
    for name in recipes("finetune"):
        if name != "demo":
            exact = tuning(f"{name}@published")
            assert (exact.precision, exact.accumulate, exact.batch // exact.accumulate) == ("fp32", 32, 4)


def test_settings_that_the_tables_name_can_be_set(table):
    cells = " ".join(" ".join(row) for row in table.values())
    words = [word for code in re.findall(r"`((?:[\w.]+=[^`\s]+ ?)+)`", cells) for word in code.split()]
    words = [word for word in words if not re.search("…|^from=|^split=|^no_finding=", word)]
    assert len(words) > 12
    for word in words:
        place = ["data.test=null", "data.holdout=0.1"] if word in ("data.test=null", "data.holdout=0.2") else []
        place += ["data.test=null"] if word.startswith("folds=") else []
        key, _, value = word.partition("=")
        config = load(FinetuneConfig, "pets", ["from=x", "data.train=a", "data.test=b", *place, word], "finetune")
        found = functools.reduce(getattr, key.split("."), config)
        assert str(found).lower() == value.lower().replace("null", "none"), word


@pytest.mark.parametrize(
    "name", [name for name in recipes("pretrain") if not name.startswith(("imagenet", "demo", "cifar"))]
)
def test_x_ray_recipes_are_the_published_configuration(facts, name):
    row = re.search(r"\| X-ray, all 13 \|(.*)\|", facts)[1]
    number = {
        key: float(re.search(pattern, row)[1].replace(",", ""))
        for key, pattern in {
            "base_lr": r"base rate ([\d.]+)", "base_batch": r"at (\d+)", "each": r"(\d+) images on each",
            "gpus": r"each of (\d+) GPUs", "batch": r"\): ([\d,]+)", "peak": r"peak rate ([\d.]+)",
            "epochs": r"(\d+) epochs", "warmup": r"warm-up (\d+)", "decay": r"decay ([\d.e-]+)",
        }.items()
    }  # fmt: skip
    for config in (pretraining(name), pretraining(f"{name}@published")):
        assert config.train.global_batch == number["batch"] == number["each"] * number["gpus"]
        optim, schedule = config.optim, config.schedule
        assert (optim.base_lr, optim.base_batch) == (number["base_lr"], number["base_batch"])
        assert timetable(schedule, optim, 224_316, config.train.global_batch).peak == pytest.approx(number["peak"])
        assert (schedule.epochs, schedule.warmup_epochs, schedule.kind) == (number["epochs"], number["warmup"], "step")
        assert (optim.weight_decay, optim.clipping) == (number["decay"], 0.01)
        assert (config.train.accumulate, config.train.keep_best) == (1, True)


@pytest.mark.parametrize(
    ("row", "recipe"),
    [("ImageNet-1k R50x1", "imagenet1k_sgd_r50x1"), ("ImageNet-1k R50x1 optimized", "imagenet1k_cosine_r50x1"),
     ("ImageNet-21k R50x1", "imagenet21k_r50x1")],
)  # fmt: skip
def test_imagenet_recipes_are_the_published_configurations(facts, row, recipe):
    said = re.search(rf"\| {re.escape(row)} \|(.*)\|", facts)[1]
    config = pretraining(recipe)
    assert "| the best by validation loss where there is a validation set, else the last |" in facts
    assert config.train.keep_best  # of data.val, where that is given
    assert re.search(rf"(AGC-SGD, |base rate ){re.escape(str(config.optim.base_lr))}\b", said)
    assert ("no clipping" in said) == (config.optim.clipping is None)
    assert f"warm-up {config.schedule.warmup_epochs:.0f}" in said
    assert f"{config.schedule.epochs:.0f} epochs" in said
    assert config.schedule.kind in said
    drawn = re.search(r"N=(\d+) M=(\d+)", said)
    assert config.data.randaugment == (drawn and [int(drawn[1]), int(drawn[2])])


def test_fine_tuning_is_the_published_configuration(facts):
    said = re.search(
        r"AGC-SGD, ([\d.]+), momentum ([\d.]+), batch (\d+) in (\d+) micro-batches of (\d+), decay (\d)", facts
    )
    lr, momentum, batch, micro, each, decay = map(float, said.groups())
    config = tuning("cifar10@published")
    assert (config.lr, config.optim.momentum, config.optim.weight_decay) == (lr, momentum, decay)
    assert (config.batch, config.accumulate, config.batch // config.accumulate) == (batch, micro, each)
    assert config.eval_every == int(re.search(r"evaluation every (\d+) steps; fp32", facts)[1])
    assert "the new head keeps PyTorch's default initialization" in facts
    assert "Warm-up begins at peak/K; milestones act one step later than the rule's number" in facts
    assert (config.precision, config.head, config.rule.timing) == ("fp32", "default", "published")
    assert tuning("flowers102@high_lr").lr == float(re.search(r"`flowers_high_lr` has rate ([\d.]+\d)", facts)[1])


def test_transforms_of_the_published_variants(facts):
    resize, crop = map(
        int, re.search(r"short side of (\d+) with their aspect kept, then cropped to (\d+)", facts).groups()
    )
    train, _ = transforms(tuning("pets@published"), rule(3680, 375, 500), {})
    assert (train.kind, train.before_crop, train.size) == ("random_short_crop", resize, crop)
    assert "outside of a warped image is reflected; downscaling by area" in facts
    for pair in (
        assemble.transforms(pretraining("chexpert_r50x1@published").data),
        transforms(tuning("nih@published"), rule(100_000, 1024, 1024), {}),
    ):
        assert pair[0].affine == Affine(45, (0.9, 1.1), 0.25, "reflect")
        assert [each.downscale for each in pair] == ["area", "area"]


def test_the_published_accuracies_on_flowers_are_of_2040_images(shared):
    """What the recipe's split rests on: shares of 2,040 test images, and not of the official 6,149."""
    file = shared / "reference" / "results" / "finetuning_results_flowers_oversampling_test_acc.csv"
    values = [float(row["metric_value"]) for row in csv.DictReader(file.open())]
    values = [value / 100 if max(values) > 1 else value for value in values]
    assert len(values) > 50
    for images, whole in ((1020 + 1020, True), (6149, False)):
        off = max(abs(value * images - round(value * images)) for value in values)
        assert (off < 1e-2) == whole, (images, off)
