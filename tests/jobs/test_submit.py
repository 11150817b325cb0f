"""Job scripts: sound as they are and as filled in; unusable words submit nothing. tests/cluster/ runs them."""

import shutil
import subprocess
import sys

import pytest

from engine.config.loading import recipes
from jobs import submit
from tests.conftest import ROOT


def dry_run(*words):
    done = subprocess.run([sys.executable, ROOT / "jobs" / "submit.py", "--dry-run", *map(str, words)],
                          capture_output=True, text=True, cwd=ROOT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def all_scripts(*where):
    """The templates as they are, and a script of each kind as filled in."""
    found = {path.name: path.read_text() for path in sorted((ROOT / "jobs").glob("*.sbatch"))}
    found["finetune"] = dry_run("finetune:natural", *where, "from=a,b", "shots=1,full", "seed=0,1", "data.train=x",
                                "data.test=y")  # fmt: skip
    found["scaling"] = dry_run("scaling", "--nodes", "2", *where, "--", "--model", "R50x1")
    found["pack"] = dry_run("pack", *where, "--", "/data/a b", "train.h5")
    found["pretrain"] = dry_run("imagenet21k_r152x4", "--nodes", "2", *where, "data.train=x", "train.accumulate=128")
    return found


@pytest.mark.parametrize("where", ["juwels_booster", "generic"])
def test_scripts_are_sound(where, tmp_path):
    for name, text in all_scripts("--cluster", where).items():
        path = tmp_path / name
        path.write_text(text)
        subprocess.run(["bash", "-n", path], check=True)
        if shutil.which("shellcheck"):
            done = subprocess.run(["shellcheck", "-x", path], capture_output=True, text=True, cwd=ROOT)
            assert done.returncode == 0, done.stdout


def test_every_recipe_can_be_submitted():
    for recipe in recipes("pretrain"):
        arguments = submit.parser().parse_intermixed_args(
            [recipe, "--nodes", "1", "--cluster", "juwels_booster", "data.train=x"]
        )
        text = submit.script(arguments)
        assert f"RECIPE={recipe}\n" in text
        for option in ("--partition=booster", "--ntasks-per-node=4", "--cpus-per-task=12", "--signal=USR1@300",
                       "--requeue"):  # fmt: skip
            assert f"#SBATCH {option}\n" in text


@pytest.mark.parametrize("words, said", [(["imagenet1k_r50"], "imagenet1k_r50x1"),
                                         (["demo", "--nodes", "0", "data.train=x"], "--nodes is 0"),
                                         (["demo", "--nodes", "9999", "data.train=x"], "9999"),
                                         (["demo", "--nodes", "3", "data.train=x"], "shared out evenly"),
                                         (["demo", "data.trian=x"], "data.train"),
                                         (["demo"], "data.train"),
                                         (["train:demo"], "finetune"),
                                         (["sweep:absent.yaml"], "absent.yaml cannot be read"),
                                         (["demo", "data.train=x", "--time", "5"], "before training has begun"),
                                         (["demo", "data.train=x", "--time", "soon"], "minutes"),
                                         (["demo", "--cluster", "jewels"], "juwels_booster")])  # fmt: skip
def test_unusable_words_submit_nothing(words, said):
    done = subprocess.run([sys.executable, ROOT / "jobs" / "submit.py", *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
