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


def run_with_stand_ins(text, folder):
    """Run a job script where `srun` and `scontrol` are programs that say what they were given."""
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    (folder / "jobs" / "env" / "juwels_booster.sh").write_text(f"export PATH={folder}/bin:$PATH\n")
    (folder / "bin").mkdir()
    for name, says in (("srun", 'echo "srun $*"; env'), ("scontrol", "echo jwb0001"), ("python", "exit 0")):
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{says}\n")
        (folder / "bin" / name).chmod(0o755)
    (folder / "script").write_text(text)
    env = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "jwb[0001-0002]",
           "SLURM_CPUS_PER_TASK": "12", "SCRATCH": str(folder)}  # fmt: skip
    return subprocess.run(["bash", folder / "script"], cwd=folder, env=env, capture_output=True, text=True, check=True)


def test_on_juwels_tasks_see_all_gpus_speak_its_mpi_and_do_not_wait_for_horovod(tmp_path):
    done = run_with_stand_ins(dry_run("imagenet21k_r50x1", "--nodes", "2", "--cluster", "juwels_booster",
                                      "data.train=x", "train.global_batch=4096"), tmp_path)  # fmt: skip
    said = done.stdout.splitlines()
    assert any(line.startswith("srun --mpi=pspmix ") and "engine.pretrain imagenet21k_r50x1" in line for line in said)
    assert "CUDA_VISIBLE_DEVICES=0,1,2,3" in said
    assert "HOROVOD_ENABLE_ASYNC_COMPLETION=1" in said


def test_steps_of_one_gpu_are_left_to_the_launcher(tmp_path):
    """A sweep's steps take a GPU each: told to see all, every one of them would take the first."""
    text = dry_run("finetune:natural", "--cluster", "juwels_booster", "from=a", "data.train=x", "data.test=y")
    assert "CUDA_VISIBLE_DEVICES" not in text
    assert "STEP_OPTIONS=(--gpus-per-task=1)" in text
