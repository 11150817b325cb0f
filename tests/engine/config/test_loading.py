import re

import pytest
from omegaconf import OmegaConf

from engine import finetune, pretrain
from engine.config.loading import explain, load, named_variants, recipes, to_yaml, variants
from engine.config.schema import FinetuneConfig, PretrainConfig
from engine.config.typed import from_word
from engine.training.timetable import timetable
from loaders.errors import UserError

PACKS = ["data.train=train.h5", "data.val=val.h5"]
PUBLISHED = [name for name in recipes("pretrain") if name not in ("demo", "cifar10_small")]


def recipe(name, *settings):
    return load(PretrainConfig, name, [*PACKS, *settings], "pretrain")


@pytest.mark.parametrize("name", recipes("pretrain"))
def test_every_recipe_is_complete_and_says_what_it_is_for(name):
    config = recipe(name)
    assert config.name == name
    assert config.about


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_follow_the_protocol(name):
    """The tables of the protocol: optimizer, learning rates, length, warm-up, schedule, batch."""
    config = recipe(name)
    natural1k, natural21k = name.startswith("imagenet1k"), name.startswith("imagenet21k")
    assert config.model.name == ("R152x4" if name.endswith("r152x4") else "R50x1")
    optim = config.optim
    assert (optim.momentum, optim.nesterov, optim.weight_decay) == (0.9, True, 1e-4)
    sgd = name == "imagenet1k_sgd_r50x1"  # its configuration: plain SGD at 0.1
    assert (optim.clipping, optim.eps, optim.base_batch) == (None if sgd else 0.01, 1e-3, 256)
    assert optim.base_lr == (0.1 if sgd else 0.03 if natural1k else 0.01)
    natural = natural1k or natural21k
    assert config.train.global_batch == (4096 if natural else 64 * 16)
    times = timetable(config.schedule, optim, 224_316, config.train.global_batch)
    assert times.peak == pytest.approx(1.6 if sgd else 0.48 if natural1k else 0.16 if natural21k else 0.04)
    assert config.schedule.epochs == (120 if name == "imagenet1k_cosine_r50x1" else 90)
    assert config.schedule.warmup_epochs == (5 if sgd else 2 if natural21k else 15)
    if "cosine" in name:
        assert config.schedule.kind == "cosine"
        assert config.data.randaugment == [2, 9]
    else:
        assert config.schedule.kind == "step"
        assert config.schedule.milestones == [30, 60, 80]
    if not name.startswith("imagenet"):
        assert (config.data.augment, config.data.rotation, config.data.translation) == ("xray", 45, 0.15)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.startswith("imagenet")])
def test_the_batch_of_the_papers_text_is_a_variant_of_each_x_ray_recipe(name):
    plain, variant = recipe(name), recipe(f"{name}@batch4096")
    assert variant.name == f"{name}_batch4096" and variant.folder == f"runs/{name}_batch4096"
    assert (variant.train.global_batch, variant.train.accumulate) == (4096, 4)  # 16 at a time on 64 GPUs, as without
    assert (plain.train.global_batch, plain.train.accumulate) == (1024, 1)
    assert timetable(variant.schedule, variant.optim, 10**6, 4096).peak == pytest.approx(0.16)
    assert (variant.model, variant.data, variant.optim, variant.schedule) == (
        plain.model, plain.data, plain.optim, plain.schedule)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "said"),
    [("nih_r50x1@batch409", "did you mean 'batch4096'"), ("nih_r50x1@", "there are: batch4096, published"),
     ("demo@batch4096", "demo has no variants"), ("nih_r50x@batch4096", "did you mean nih_r50x1")],
)  # fmt: skip
def test_an_unknown_variant_names_those_there_are(name, said):
    with pytest.raises(UserError, match=re.escape(said)):
        recipe(name)


def test_a_file_has_variants_of_its_own_and_of_what_it_extends(tmp_path):
    base = "name: base\ntrain: {seed: 1}\nvariants: {big: {train: {global_batch: 64}}, odd: 1}\n"
    (tmp_path / "base.yaml").write_text(base)
    mine = tmp_path / "mine@home.yaml"
    mine.write_text("extends: base\nname: mine\nvariants: {small: {name: tiny, train: {global_batch: 8}}}\n")
    assert recipe(str(mine)).name == "mine"
    assert named_variants(mine) == ["big", "odd", "small"]
    big, small = recipe(f"{mine}@big"), recipe(f"{mine}@small", "train.seed=2")
    assert (big.name, big.train.global_batch, big.train.seed) == ("mine_big", 64, 1)
    assert (small.name, small.train.global_batch, small.train.seed) == ("tiny", 8, 2)
    for wrong in ("odd", "huge"):
        with pytest.raises(UserError, match="there are: big, odd, small"):
            recipe(f"{mine}@{wrong}")


def test_every_published_run_of_the_protocol_has_a_recipe():
    sources = ["imagenet1k", "imagenet1k_cosine", "imagenet21k", "chexpert", "mimic", "nih", "padchest",
               "chexpert_mimic", "chexpert_mimic_nih", "chexpert_mimic_nih_padchest",
               "chexpert_padchest", "chexpert_nih_padchest", "mimic_padchest", "mimic_nih_padchest",
               "chexpert_mimic_padchest"]  # fmt: skip
    runs = {f"{source}_{network}" for source in sources for network in ("r50x1", "r152x4")}
    assert set(PUBLISHED) == runs | {"imagenet1k_sgd_r50x1"}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optim.base_rl=1", "optim.base_lr"),
        ("train.global_bach=1", "train.global_batch"),
        ("schedul.epochs=1", "schedule.epochs"),
        ("train.global_batch=many", "train.global_batch"),
        ("train.global_batch=0", "1 to 2,147,483,648"),
        ("train.precision=fp8", "bf16, fp32, tf32, fp16"),
        ("data.scale=[0.5]", "must be 2 numbers"),
        ("data=train.h5", "data is a section"),
        ("batch", "not key=value"),
        ("schedule.milestones=[60,30]", "must rise"),
        ("train.seed=[", "train.seed"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_would_be_right(setting, said):
    with pytest.raises(UserError, match=re.escape(said)):
        recipe("imagenet1k_r50x1", setting)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean imagenet1k_r50x1"):
        recipe("imagenet1k_r50x")


def test_what_a_recipe_leaves_open_must_be_said():
    with pytest.raises(UserError, match="data.train=…"):
        load(PretrainConfig, "imagenet1k_r50x1", [], "pretrain")


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "model: R50x1\n", "nonsense: 1\n"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError):
        recipe(str(file))


def test_a_file_may_extend_another_and_the_command_line_has_the_last_word(tmp_path):
    (tmp_path / "base.yaml").write_text("name: base\ntrain: {global_batch: 64, seed: 3}\n")
    (tmp_path / "mine.yaml").write_text("extends: base\nname: mine\ntrain: {global_batch: 128}\n")
    config = recipe(str(tmp_path / "mine.yaml"), "train.seed=9")
    assert (config.name, config.train.global_batch, config.train.seed) == ("mine", 128, 9)


@pytest.mark.parametrize("name", ["imagenet21k_r152x4", "nih_r50x1", "demo"])
def test_the_saved_configuration_is_a_recipe_that_gives_the_same(tmp_path, name):
    config = recipe(name, "data.scale=[0.3,1.0]", "train.checkpoint_every=10")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load(PretrainConfig, str(file), [], "pretrain") == config


def test_from_is_called_from_in_files_and_on_the_command_line(tmp_path):
    settings = ["from=random", "model=R50x1", "data.train=a.h5", "data.test=b.h5"]
    config = load(FinetuneConfig, "natural", settings, "finetune")
    text = to_yaml(config)
    assert OmegaConf.create(text)["from"] == "random"
    (tmp_path / "again.yaml").write_text(text)
    assert load(FinetuneConfig, str(tmp_path / "again.yaml"), [], "finetune") == config


def test_several_values_are_all_their_combinations():
    found = variants(["from=a,b", "shots=1,full", "data.scale=[1,2]"], ("from", "shots"))
    assert found == [
        ["from=a", "shots=1", "data.scale=[1,2]"],
        ["from=a", "shots=full", "data.scale=[1,2]"],
        ["from=b", "shots=1", "data.scale=[1,2]"],
        ["from=b", "shots=full", "data.scale=[1,2]"],
    ]


@pytest.mark.parametrize("schema", [PretrainConfig, FinetuneConfig])
def test_help_explains_every_key(schema):
    for line in explain(schema).splitlines():
        assert re.match(r"  [a-z_0-9.]+=.*  ?\S+ \S+", line), line


def test_the_recipes_named_in_the_help_exist():
    named = re.findall(r"engine\.pretrain (\w+) ", pretrain.ABOUT)
    assert named
    assert set(named) <= set(recipes("pretrain"))
    assert set(re.findall(r"engine\.finetune (\w+) ", finetune.ABOUT)) <= set(recipes("finetune"))


TEXTS = ["0123", "010", "1e5", "run #3", "no", "1:30", "~", "0x1F", "1_000", ".inf", "2024-01-01", "a: b", "- x", "&a",
         "*b", "!c", "%d", "@e", "`f`", "{g", "[h", "true", "x' y", "é ü", "a,b", "1.0"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_as_typed_on_the_command_line(text):
    for key in ("name", "folder", "model.weights", "data.val", "data.train"):
        assert from_word(PretrainConfig, key, text) == (True, text)
        assert from_word(PretrainConfig, key, f'"{text}"') == (True, text)
    if "'" not in text and "," not in text:
        assert from_word(PretrainConfig, "data.train", f"[{text}.h5, b.h5]") == (True, [f"{text}.h5", "b.h5"])


def test_text_stays_as_typed_in_recipes(tmp_path):
    config = recipe("imagenet1k_r50x1", "name=010", "folder=out/run #3", "model.weights=1e5", "data.val=[no,0x1]")
    assert (config.name, config.folder, config.model.weights) == ("010", "out/run #3", "1e5")
    assert config.data.val == ["no", "0x1"]
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load(PretrainConfig, str(tmp_path / "again.yaml"), [], "pretrain") == config
    text = "name: 0123\nfolder: 1:30\nmodel: {name: no, weights: 1e5}\ndata: {train: [010, 1_0], val: 2024-01-01}\n"
    (tmp_path / "my.yaml").write_text(text + "train: {seed: 010, precision: fp32}\nschedule: {milestones: [1, 2.5]}\n")
    config = load(PretrainConfig, str(tmp_path / "my.yaml"), [], "pretrain")
    assert (config.name, config.folder, config.model.name, config.model.weights) == ("0123", "1:30", "no", "1e5")
    assert (config.data.train, config.data.val, config.train.seed) == (["010", "1_0"], "2024-01-01", 10)
    assert config.schedule.milestones == [1, 2.5]
    with open(tmp_path / "my.yaml", "a") as file:
        file.write("variants: {other: {folder: 012, model: {weights: 1e6}}}\n")
    config = load(PretrainConfig, f"{tmp_path / 'my.yaml'}@other", [], "pretrain")
    assert (config.name, config.folder, config.model.weights) == ("0123_other", "012", "1e6")


def test_numbers_are_decimal_and_none_is_none():
    config = recipe("imagenet1k_r50x1", "train.seed=010", "optim.base_lr=1e-3", "data.flip=no", "optim.clipping=null")
    assert (config.train.seed, config.optim.base_lr, config.data.flip, config.optim.clipping) == (10, 1e-3, False, None)
    assert recipe("imagenet1k_r50x1", "model.weights=null").model.weights is None
    assert recipe("imagenet1k_r50x1", "model.weights='null'").model.weights == "null"
    tuned = ["from=w.pth", "data.test=t.h5", "data.train=a.h5"]
    assert load(FinetuneConfig, "cifar10", [*tuned, "shots=010"], "finetune").shots == "010"
    assert load(FinetuneConfig, "cifar10", [*tuned, "source=08"], "finetune").source == "08"
    assert load(FinetuneConfig, "cifar10", [*tuned, "folder=${name}/x #1"], "finetune").folder == "cifar10/x #1"
