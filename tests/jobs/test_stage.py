"""An environment that is staged is whole, and its ranks leave the shared folder alone."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench.measured import calls
from tests.conftest import ROOT

MODULES = 100
STAGE = ROOT / "jobs" / "env" / "stage.sh"
PROGRAM = "import probe, loaders.errors, engine.whole, asyncio, sys, ssl; print(sys.prefix, loaders.errors.__file__)"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """An environment on a shared folder, with a package of a hundred modules; and both archives."""
    shared = tmp_path_factory.mktemp("shared")
    base = os.path.realpath(sys.executable)
    subprocess.run([base, "-m", "venv", "--without-pip", shared / "venv"], check=True)
    (packages,) = shared.glob("venv/lib/python*/site-packages")
    (packages / "probe").mkdir()
    (packages / "probe" / "__init__.py").write_text("".join(f"from . import part{i}\n" for i in range(MODULES)))
    for i in range(MODULES):
        (packages / "probe" / f"part{i}.py").write_text("")
    pack(shared)
    return shared


def pack(shared):
    subprocess.run(
        [STAGE, "pack", shared / "env.tar", shared / "tree.tar"], env={**os.environ, "VENV": str(shared / "venv")},
        check=True, cwd=shared,
    )  # fmt: skip


def rank(venv, tree, **more):
    env = {"PATH": f"{venv}/bin:/usr/bin:/bin", "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1", **more}
    return {"words": [f"{venv}/bin/python", "-c", PROGRAM], "env": env}


def test_a_staged_rank_leaves_the_shared_folder_alone(site, tmp_path):
    if calls.why_not():
        pytest.skip(calls.why_not())
    local = tmp_path / "local"
    subprocess.run([STAGE, "unpack", site / "env.tar", site / "tree.tar", local], check=True)
    everywhere = [site, ROOT, Path(sys.base_prefix)]
    plain = rank(site / "venv", ROOT)
    before = calls.below(calls.paths(plain["words"], folder=site, env=plain["env"]), everywhere)
    staged = rank(local / "venv", local / "tree")
    after = calls.paths(staged["words"], folder=site, env=staged["env"])
    assert before > 4 * MODULES
    usr = Path("/usr") in everywhere  # a system's Python is on the nodes already, and is not staged
    # The folder where it runs, and where the linker looks for libpython first.
    assert calls.below(after, everywhere[:2] if usr else everywhere) <= 50
    assert calls.below(after, [local]) > 4 * MODULES
    said = subprocess.run(staged["words"], env=staged["env"], cwd=site, capture_output=True, text=True, check=True)
    assert said.stdout.split() == [str(local / "venv"), str(local / "tree" / "loaders" / "errors.py")]


def test_the_environment_is_packed_once_and_again_when_it_changed(site):
    before = (site / "env.tar").stat().st_mtime_ns
    pack(site)
    assert (site / "env.tar").stat().st_mtime_ns == before
    (packages,) = site.glob("venv/lib/python*/site-packages")
    (packages / "new.py").write_text("")
    pack(site)
    assert (site / "env.tar").stat().st_mtime_ns > before
    listed = subprocess.run(["tar", "-tf", site / "env.tar"], capture_output=True, text=True, check=True).stdout
    assert "site-packages/new.py" in listed
    assert not list(site.glob("*.part"))


def test_an_archive_that_is_cut_or_does_not_fit_says_so(site, tmp_path):
    whole = (site / "env.tar").read_bytes().rstrip(b"\0")  # of Debian's Python a small one, for that does not go along
    # Between two files as well, where tar takes what there is.
    with tarfile.open(site / "env.tar") as tar:
        between = [tar.next(), tar.next()][1].offset
    for number, end in enumerate((len(whole) // 2, between)):
        (tmp_path / "cut.tar").write_bytes(whole[:end])
        words = [STAGE, "unpack", tmp_path / "cut.tar", site / "tree.tar", tmp_path / f"a{number}"]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode != 0 and "was not unpacked" in done.stderr
    words = [STAGE, "unpack", site / "env.tar", site / "tree.tar", "/dev/full/a"]
    assert subprocess.run(words, capture_output=True, text=True).returncode != 0
    for words in ([], ["pack"], ["unpack", "a"], ["mend"]):
        done = subprocess.run([STAGE, *words], capture_output=True, text=True)
        assert (done.returncode, done.stderr[:7]) == (1, "error: ")


SRUN = """#!/bin/bash
echo "srun $*" >>"$LOG"
while [[ ${1:-} == -* ]]; do shift; done
case $* in
*engine.pretrain*) python -c 'import engine, sys; print(engine.__file__, sys.prefix)' && echo "$BOOSTERBIT_COMMIT" ;;
*) "$@" ;;
esac
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_job_stages_runs_there_and_leaves_nothing(site, tmp_path, fails):
    """srun is one that runs what it is given."""
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "submit.py", "--dry-run", "demo", "--cluster", "generic", "--stage",
         tmp_path / "local", "data.train=x", "train.global_batch=64"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    work = tmp_path / "work"
    for folder in ("jobs", "engine", "loaders", "bench"):
        shutil.copytree(ROOT / folder, work / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    subprocess.run("git init -q && git add -A && git -c user.name=a -c user.email=a@b commit -qm x", shell=True,
                   cwd=work, check=True)  # fmt: skip
    (packages,) = site.glob("venv/lib/python*/site-packages")
    (packages / "torch.py").write_text("")  # what jobs/common.sh looks for
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho localhost\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    if fails:
        (tmp_path / "local").write_text("no folder can be made here")
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "VENV": str(site / "venv"), "RUNS": str(tmp_path / "runs"),
           "LOG": str(tmp_path / "log"), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "HOME": str(tmp_path),
           "SLURM_JOB_NODELIST": "localhost", "SLURM_CPUS_PER_TASK": "1"}  # fmt: skip
    ran = subprocess.run(["bash", "-c", done.stdout], cwd=work, env=env, capture_output=True, text=True)
    steps = (tmp_path / "log").read_text().splitlines()
    assert "--nodes=1 --ntasks=1 --ntasks-per-node=1 jobs/env/stage.sh unpack" in steps[0]
    assert f"rm -rf {tmp_path}/local/boosterbit-7" in steps[-1]
    assert not (tmp_path / "local" / "boosterbit-7").exists()
    assert not list((tmp_path / "runs").rglob("*.tar"))
    assert len(steps) == (2 if fails else 3)
    assert (ran.returncode == 0) != fails, ran.stderr
    if not fails:
        place = tmp_path / "local" / "boosterbit-7"
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=work, capture_output=True, text=True)
        said = " ".join(ran.stdout.splitlines()[-2:]).split()
        assert said == [str(place / "tree/engine/__init__.py"), str(place / "venv"), commit.stdout.strip()]
