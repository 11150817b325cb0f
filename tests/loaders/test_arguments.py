"""A ~ at the start of a path is the home folder wherever people type one, not a folder of that name."""

import argparse
import dataclasses
import os
import pwd
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from engine import report
from engine.config.loading import PLACES, load
from engine.config.schema import FinetuneConfig, PretrainConfig
from engine.transfer import sweep_file
from jobs import submit
from loaders import pack
from loaders.arguments import PICTURES, SEEDS, as_path, as_picture, expanded
from loaders.errors import UserError

ME = pwd.getpwuid(os.getuid())


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", ["a/~", "./~", "", "sklearn:digits", "/x~", "random", "a~b", "in21k/train-*"])
def test_other_words_stay_as_typed(text, home):
    assert expanded(text) == text


def test_a_home_folder_is_put_in(home):
    assert [expanded("~"), expanded("~/a b/~"), expanded("~/train-*")] == [
        str(home), f"{home}/a b/~", f"{home}/train-*",
    ]  # fmt: skip
    assert expanded(f"~{ME.pw_name}/x") == f"{ME.pw_dir}/x"


@pytest.mark.parametrize(
    ("text", "said"), [("~nobody-of-this-name/x", r"write \./~nobody-of-this-name"), ("a\0b", "NUL")]
)
def test_what_is_no_place_is_said(text, said, home):
    with pytest.raises(UserError, match=said):
        expanded(text)
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        as_path(text)


def test_a_file_whose_name_begins_with_the_sign_can_be_named(home):
    (home / "~backup.h5").touch()
    assert expanded("~backup.h5") == "~backup.h5"


def test_pictures_end_as_such(home):
    assert as_picture("~/a.PNG") == home / "a.PNG"
    supported = Figure().canvas.get_supported_filetypes()
    assert {ending.removeprefix(".") for ending in PICTURES} <= set(supported)
    for name in ("a", "a.txt", "png", "a.png/b"):
        with pytest.raises(argparse.ArgumentTypeError, match="does not end as a picture does"):
            as_picture(name)


def leaf(config, key):
    for part in key.split("."):
        config = getattr(config, "from_" if part == "from" else part)
    return config


def keys(schema, prefix=""):
    for item in dataclasses.fields(schema):
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        name = prefix + item.name.removesuffix("_")
        yield from keys(type(default), f"{name}.") if dataclasses.is_dataclass(default) else [name]


KINDS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
PLACED = [(kind, key) for kind, schema in KINDS.items() for key in keys(schema) if key in PLACES]


def test_all_places_are_keys_and_no_key_that_sounds_like_one_is_left_out():
    known = {key for schema in KINDS.values() for key in keys(schema)}
    assert set(PLACES) <= known
    sounding = {key for key in known if key.split(".")[-1] in ("train", "test", "val", "weights", "folder", "results")}
    assert sounding <= set(PLACES)


@pytest.mark.parametrize(("kind", "key"), PLACED)
@pytest.mark.parametrize("where", ["command line", "recipe"])
def test_in_every_key_that_is_a_place(kind, key, where, home):
    packs = {"pretrain": ["data.train=x"], "finetune": ["data.train=x", "data.test=x", "from=random", "model=R50x1"]}
    words, recipe = [*packs[kind], f"{key}=~/runs/a b"], "demo"
    if where == "recipe":
        nested = "~/runs/a b"
        for part in reversed(key.split(".")):
            nested = {part: nested}
        recipe = home / "mine.yaml"
        (home / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", **nested}))
        words = [word for word in packs[kind] if not word.startswith(f"{key}=")]
    config = load(KINDS[kind], str(recipe), words, kind)
    assert leaf(config, key) == f"{home}/runs/a b"


def test_in_each_pack_of_a_list(home):
    config = load(PretrainConfig, "demo", ["data.train=[~/a.h5,b.h5]", "data.val=null"], "pretrain")
    assert config.data.train == [f"{home}/a.h5", "b.h5"] and config.data.val is None


def test_in_the_name_of_a_recipe_and_what_a_variable_holds(home, monkeypatch):
    monkeypatch.setenv("PACKS", "~/packs")
    (home / "mine.yaml").write_text("name: mine\ndata: {train: '${oc.env:PACKS}/x.h5'}\nvariants: {b: {about: b}}\n")
    for name in ("~/mine.yaml", "~/mine.yaml@b"):
        assert load(PretrainConfig, name, [], "pretrain").data.train == f"{home}/packs/x.h5"


@pytest.mark.parametrize("base", ["../other", "~/other", "3", "[a]", "/abs"])
def test_a_recipe_extends_one_beside_it(base, home):
    (home / "mine.yaml").write_text(f"name: mine\nextends: {base}\n")
    with pytest.raises(UserError, match="extends"):
        load(PretrainConfig, "mine.yaml", ["data.train=x"], "pretrain")


def test_in_every_place_of_a_sweep(home, digits, monkeypatch):
    for part in ("train", "test"):
        (home / f"{part}.h5").symlink_to(digits / f"high-{part}.h5")
    (home / "run").mkdir()
    content = {
        "name": "study", "folder": "~/study", "checkpoints": {"mine": "~/run"}, "seeds": [0],
        "targets": {"a": {"recipe": "demo", "train": ["~/train.h5"], "test": "~/test.h5"}},
    }  # fmt: skip
    (home / "study.yaml").write_text(yaml.safe_dump(content))
    (only,) = sweep_file.read(Path("study.yaml")).runs
    config = only.config
    assert (config.from_, config.results) == (f"{home}/run", f"{home}/study/results.jsonl")
    assert (config.data.train, config.data.test) == ([f"{home}/train.h5"], f"{home}/test.h5")
    words = submit.parser().parse_intermixed_args(["sweep:~/study.yaml", "--cluster", "generic"])
    assert f"SWEEP={home}/study.yaml\n" in submit.script(words)


def test_in_options_of_commands(home, digits, capsys):
    (home / "results.jsonl").write_text(
        '{"metric_value": 50, "metric": "top1", "seed": 0, "shot": "1", "pretrained_model": "a", "dataset": "b"}\n'
    )
    report.main(["~/results.jsonl", "--plot=~/a.svg"])
    (home / "test.h5").symlink_to(digits / "high-test.h5")
    assert pack.main(["verify", "~/test.h5"]) == 0
    assert (home / "a.svg").stat().st_size and sorted(path.name for path in home.iterdir() if "~" in path.name) == []


def test_seeds_are_those_that_numpy_takes(capsys):
    for seed in SEEDS:
        np.random.RandomState(seed)
    with pytest.raises(ValueError, match="between"):
        np.random.RandomState(SEEDS[1] + 1)
