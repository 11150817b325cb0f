"""Job scripts: sound as they are and as filled in; unusable words submit nothing. tests/cluster/ runs them."""

import shutil
import subprocess
import sys

import pytest
import yaml

from engine.config.loading import recipes
from jobs import submit
from loaders.errors import UserError
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
                                         (["pack", "--restarts", "3", "--", "a", "b"], "--restarts is for pre-"),
                                         (["demo", "--nodes", "3", "data.train=x"], "shared out evenly"),
                                         (["demo", "--nodes", "3", "data.train=x", "train.micro_batch=4",
                                           "train.reproducible=true"], "16 micro-batches a step on 12 ranks"),
                                         (["demo", "data.trian=x"], "data.train"),
                                         (["demo"], "data.train"),
                                         (["train:demo"], "finetune"),
                                         (["sweep:absent.yaml"], "absent.yaml cannot be read"),
                                         (["demo", "data.train=x", "--time", "5"], "before training has begun"),
                                         (["demo", "data.train=x", "--time", "soon"], "minutes"),
                                         (["demo", "data.train=x", "--time", "1:-5"], "minutes"),
                                         (["pack", "--time", "soon", "--", "a", "b"], "minutes"),
                                         (["demo", "data.train=x\n#SBATCH --exclusive"], "settings: "),
                                         (["demo", "data.train=x", "--name", "a\nb"], "--name: 'a\\nb' holds '\\n'"),
                                         (["demo", "data.train=x", "--account", "a\tb"], "--account"),
                                         (["demo", "data.train=x", "--sbatch=--comment=a\rb"], "--sbatch"),
                                         (["pack", "--", "a\x7f", "b"], "settings: "),
                                         (["demo", "data.train=x", "--name", "a/b"], "the name 'a/b'"),
                                         (["demo", "data.train=x", "name=a/b"], "the name 'a/b'"),
                                         (["demo", "data.train=x", "--name", ".."], "the name '..'"),
                                         (["demo", "data.train=x", "--name", "${HOME}"], "the name '${HOME}'"),
                                         (["demo", "data.train=x", "--name", "ä" * 101], "200 bytes"),
                                         (["demo", "data.train=x", "--sbatch=--exclude n1"], "its value after a ="),
                                         (["demo", "data.train=x", "--sbatch=-p batch"], "its value after a ="),
                                         (["demo", "data.train=x", "--sbatch=batch"], "its value after a ="),
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


@pytest.mark.parametrize("restarts", [None, 3])
def test_a_job_starts_what_crashed_again_where_it_is_asked_to(tmp_path, restarts):
    words = [] if restarts is None else ["--restarts", restarts]
    text = dry_run("demo", "--nodes", "2", "--cluster", "juwels_booster", "data.train=x", *words)
    text = text.replace("python -m jobs.supervise", "echo supervised")
    said = run_with_stand_ins(text, tmp_path).stdout
    step = "srun --mpi=pspmix --wait=120 python -m engine.pretrain demo"
    folder = f"{tmp_path}/boosterbit/runs/demo"
    supervised = f"supervised --folder {folder} --restarts 3 --leave-75 -- {step} folder={folder} data.train=x"
    assert (supervised in said) is (restarts is not None)
    assert any(line.startswith(step) for line in said.splitlines()) is (restarts is None)


def test_steps_of_one_gpu_are_left_to_the_launcher(tmp_path):
    """A sweep's steps take a GPU each: told to see all, every one of them would take the first."""
    text = dry_run("finetune:natural", "--cluster", "juwels_booster", "from=a", "data.train=x", "data.test=y")
    assert "CUDA_VISIBLE_DEVICES" not in text
    assert "STEP_OPTIONS=(--gpus-per-task=1)" in text


def slurms_words(line):
    """Words of a #SBATCH line as sbatch takes them apart (_get_argument in its opt.c): \\ escapes, in quotes too."""
    words, word, quote, escaped = [], None, "", False
    for sign in line.removeprefix("#SBATCH") + " ":
        if escaped:
            word, escaped = (word or "") + sign, False
        elif sign == "\\":
            escaped = True
        elif quote and sign == quote:
            quote = ""
        elif not quote and sign in "'\"":
            word, quote = word or "", sign
        elif not quote and sign.isspace():
            words += [] if word is None else [word]
            word = None
        elif word is None and sign == "#":
            break
        else:
            word = (word or "") + sign
    assert not quote and not escaped
    return words


@pytest.mark.parametrize(
    "name",
    ["my run", "a #b", "it's", 'say "x"', "back\\slash\\", "$HOME `id`", "é→漢", "# --- end", "# --- filled in", "\\1"],
)
def test_any_name_is_one_word_for_slurm_and_for_bash(name):
    text = dry_run(
        "demo", "data.train=x", "--nodes=1", f"--name={name}", f"--account={name}", f"--sbatch=--comment={name}"
    )
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    read = [slurms_words(line) for line in lines]
    assert all(len(words) == 1 for words in read)
    assert {f"--job-name={name}", f"--account={name}", f"--comment={name}"} <= {word for (word,) in read}
    values = text[text.index("# --- filled in by") : text.index("\n# --- end\n")]
    said = subprocess.run(["bash", "-euc", values + '\nprintf %s "$NAME"'], capture_output=True, check=True).stdout
    assert said.decode() == name


def test_a_recipe_in_a_folder_names_a_job_by_its_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    text = dry_run(f"finetune:{tmp_path / 'mine.yaml'}", "from=a", "data.train=x", "data.test=y")
    assert "#SBATCH --job-name=finetune-mine\n" in text and "NAME=finetune-mine\n" in text


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("tasks_per_node", "four", "a number, 1 or more"), ("tasks_per_node", True, "a number"), ("max_nodes", 0, "1 or"),
     ("visible", 0, "a text in quotes"), ("sbatch", "--gres=gpu:4", "a list of words"), ("step", [1], "a list of word"),
     ("time", 20, "a text in quotes"), ("time", "soon", "minutes"), ("env", None, "a text"),
     ("sbatch", ["--gres=a\nb"], "one line for each word"), ("node", 1, "must hold the keys")],
)  # fmt: skip
def test_a_file_of_a_cluster_is_checked(tmp_path, key, value, said):
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({key: value}))
    arguments = submit.parser().parse_intermixed_args(["pack", f"--cluster={tmp_path / 'site.yaml'}", "--", "a", "b"])
    with pytest.raises(UserError, match=said):
        submit.script(arguments)


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe", b"- a"])
def test_what_is_no_file_of_a_cluster_is_told(tmp_path, content):
    (tmp_path / "site.yaml").write_bytes(content)
    with pytest.raises(UserError, match="site.yaml"):
        submit.read_cluster(str(tmp_path / "site.yaml"))
