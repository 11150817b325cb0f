"""What runs on a cluster, run on one: two nodes of Slurm on this host, Horovod over MPI between them."""

import json
import random
import re
import sys

import pytest
import yaml

from engine.comm.launch import expand_hosts
from engine.saving import checkpoint
from tests.conftest import ROOT
from tests.jobs.test_submit import all_scripts

SHORT = ["schedule.epochs=null", "schedule.steps=20", "schedule.warmup_steps=2", "train.log_every=1"]
LIMIT_STEPS = 320

# Put before everything a job's Python imports: the first life of a job is too slow for its time limit.
SLOW = """
import os
if os.environ.get("SLURM_STEP_NUM_TASKS") and not os.environ.get("SLURM_RESTART_COUNT"):
    import time
    from engine.training.trainer import Trainer
    whole = Trainer.train_step
    def train_step(self, micro_batches):
        time.sleep(0.2)
        whole(self, micro_batches)
    Trainer.train_step = train_step
"""


# All tasks of the first step of a job crash, together, at its 12th training step.
CRASHES = """
import os, pathlib
mark = pathlib.Path(__file__).with_name("crashed")
if os.environ.get("SLURM_STEP_NUM_TASKS") and not mark.exists():
    from engine.training.trainer import Trainer
    whole = Trainer.train_step
    def train_step(self, micro_batches):
        if self.step == 12:
            mark.touch()
            os._exit(9)
        whole(self, micro_batches)
    Trainer.train_step = train_step
"""


@pytest.fixture(scope="module")
def site(cluster):
    """The YAML file that tells jobs/submit.py of this cluster."""
    path = cluster.folder / "site.yaml"
    path.write_text(yaml.safe_dump({"env": "generic", "tasks_per_node": 1, "cpus_per_task": 1, "sbatch": [], "step": [],
                                    "mpi": "pmix", "time": "20", "max_nodes": 2}))  # fmt: skip
    return path


def submit(cluster, site, *words, env=None):
    """Number of the job that jobs/submit.py made of these words."""
    output = f"--sbatch=--output={cluster.folder}/%x-%j.out"
    command = [sys.executable, ROOT / "jobs" / "submit.py", "--cluster", site, output, *words]
    done = cluster.command(*command, cwd=ROOT, env=env or {})
    return re.search(r"Submitted batch job (\d+)", done.stdout)[1]


def output(cluster, job):
    return "\n".join(path.read_text() for path in cluster.folder.glob(f"*-{job}*.out"))


def packs(digits):
    return [f"data.train={digits / 'low-train.h5'}", f"data.val={digits / 'low-test.h5'}"]


@pytest.fixture(scope="module")
def near_its_limit(cluster, site, digits):
    """A job that its time limit of a minute will meet; submitted first, for it takes longest."""
    folder = cluster.folder / "site-packages"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SLOW)
    steps = ["schedule.epochs=null", f"schedule.steps={LIMIT_STEPS}", "schedule.warmup_steps=2", "train.log_every=10"]
    words = ["demo", "--nodes", "2", "--time", "1", "--signal", "5", "--name", "limited", *packs(digits), *steps]
    return submit(cluster, site, *words, env={"PYTHONPATH": f"{folder}:{ROOT}"})


def test_srun_pretrains_over_two_nodes(cluster, digits, near_its_limit):
    folder = cluster.folder / "runs" / "srun"
    words = ["-m", "engine.pretrain", "demo", *packs(digits), *SHORT, f"folder={folder}"]
    done = cluster.command("srun", "-N2", "-n2", sys.executable, *words, cwd=ROOT, timeout=300)
    assert "2 ranks (horovod (MPI))" in done.stdout
    surroundings = json.loads((folder / "environment.json").read_text())
    assert (surroundings["ranks"], surroundings["launched_by"]) == (2, "Slurm")
    assert checkpoint.find(folder).name == "step-00000020"


def test_jobs_run(cluster, site, digits):
    """Pre-training, a sweep from what it left, packing, and scaling, as submitted jobs."""
    picture = cluster.folder / "digits.h5"
    pack = submit(cluster, site, "pack", "--", "sklearn:digits", picture, "--workers", "1")
    pretrain = submit(cluster, site, "demo", "--nodes", "2", "--name", "job", *packs(digits), *SHORT)
    assert cluster.wait(pretrain) == "COMPLETED", output(cluster, pretrain)
    assert checkpoint.find(cluster.folder / "runs" / "job").name == "step-00000020"
    assert "2 ranks (horovod (MPI))" in output(cluster, pretrain)

    test = [f"data.train={digits / 'high-train.h5'}", f"data.test={digits / 'high-test.h5'}"]
    source = f"from={cluster.folder / 'runs' / 'job'}"
    sweep = submit(cluster, site, "finetune:demo", "--nodes", "2", "--name", "sweep", source, "shots=1,2", *test,
                   "rule.steps=4")  # fmt: skip
    file = cluster.folder / "study.yaml"
    target = {"recipe": "demo", "train": str(digits / "high-train.h5"), "test": str(digits / "high-test.h5")}
    file.write_text(yaml.safe_dump({"name": "study", "folder": str(cluster.folder / "study"), "shots": [1, 2],
                                    "checkpoints": {"job": str(cluster.folder / "runs" / "job")}, "seeds": [0, 1],
                                    "set": {"rule": {"steps": 2}}, "targets": {"high": target}}))  # fmt: skip
    study = submit(cluster, site, f"sweep:{file}", "--nodes", "2")
    words = ["--model", "R20x0.25-32px", "--size", "32", "--batch", "4", "--warmup", "1", "--steps", "3"]
    rows = cluster.folder / "rows.json"
    scaling = submit(cluster, site, "scaling", "--nodes", "2", "--", *words, "--repeats", "2", "--json", rows,
                     "--plot", cluster.folder / "rows.png")  # fmt: skip
    for job in (pack, sweep, study, scaling):
        assert cluster.wait(job) == "COMPLETED", output(cluster, job)

    assert picture.is_file()
    lines = [json.loads(line) for line in (cluster.folder / "runs" / "sweep.jsonl").read_text().splitlines()]
    assert sorted(line["shot"] for line in lines) == ["1", "2"]
    lines = [json.loads(line) for line in (cluster.folder / "study" / "results.jsonl").read_text().splitlines()]
    assert sorted((line["shot"], line["seed"]) for line in lines) == [("1", 0), ("1", 1), ("2", 0), ("2", 1)]
    assert (cluster.folder / "study" / "results.csv").is_file()
    content = json.loads(rows.read_text())
    assert [(row["gpus"], row["source"]) for row in content["rows"]] == [(1, "measured"), (2, "measured")]
    assert content["losses_agree"].startswith("agree")
    assert content["rows"][1]["communicator"] == "horovod (MPI)"
    assert "srun" in content["launched_by"]


def test_a_job_at_its_time_limit_requeues_itself_and_finishes(cluster, near_its_limit):
    cluster.hasten(near_its_limit)
    assert cluster.wait(near_its_limit, hastened=True) == "COMPLETED", output(cluster, near_its_limit)
    said = output(cluster, near_its_limit)
    assert "stopped by SIGUSR1" in said
    assert "start number 1" in said
    assert "goes on from" in said
    folder = cluster.folder / "runs" / "limited"
    assert checkpoint.find(folder).name == f"step-{LIMIT_STEPS:08d}"
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
             if json.loads(line)["kind"] == "train"]  # fmt: skip
    assert steps == list(range(10, LIMIT_STEPS + 1, 10))  # none lost, none twice


def test_a_job_starts_again_what_crashed(cluster, site, digits):
    """Within its time, as another step of the same job."""
    folder = cluster.folder / "crashing"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CRASHES)
    words = ["demo", "--nodes", "2", "--restarts", "2", "--name", "crashing", *packs(digits), *SHORT]
    job = submit(cluster, site, *words, "train.checkpoint_every=5", env={"PYTHONPATH": f"{folder}:{ROOT}"})
    assert cluster.wait(job) == "COMPLETED", output(cluster, job)
    said = output(cluster, job)
    assert "start 1 ended with code 9" in said
    assert re.search(r"supervise .*: start 2, from step (5|10)\n", said) and "goes on from" in said
    assert "the work is done" in said
    assert checkpoint.find(cluster.folder / "runs" / "crashing").name == "step-00000020"


def test_slurm_takes_all_scripts(cluster, site, tmp_path):
    for name, text in all_scripts("--cluster", site).items():
        path = tmp_path / name
        path.write_text(text)
        cluster.command("sbatch", "--test-only", path)


def test_node_lists_are_expanded_as_slurm_does(cluster):
    rng = random.Random(0)

    def ranges():
        first = rng.randrange(0, 120)
        width = rng.choice([1, 2, 3, 4])
        last = f"-{first + rng.randrange(0, 12):0{width}d}" if rng.random() < 0.7 else ""
        return f"{first:0{width}d}{last}"

    def entry():
        parts = [f"{rng.choice('abc')}[{','.join(ranges() for _ in range(rng.choice([1, 1, 3])))}]" for _ in range(2)]
        return rng.choice([parts[0], "".join(parts), "login1"])

    for _ in range(40):
        nodes = ",".join(entry() for _ in range(rng.choice([1, 2, 3])))
        assert list(expand_hosts(nodes)) == cluster.command("scontrol", "show", "hostnames", nodes).stdout.split(), (
            nodes
        )


NASTY = ["my run", "a #b", "it's", 'say "x"', "back\\slash", "$HOME", "$(id)", "`id`", "a;b&c|d", "*?[x]", "~", "é→漢",
         "-x", "--exclusive", "%j%x", "# --- filled in", "# --- end", "!", "a=b", "(x)", "x\\"]  # fmt: skip


def test_words_of_a_job_are_what_was_typed(cluster, site, digits):
    """Names and comments of any signs, and random ones: as Slurm then shows the job, and as bash reads the script."""
    draw = random.Random(0)
    signs = [chr(code) for code in range(33, 127) if chr(code) != "/"]
    random_ones = ["".join(draw.choices([*signs, " "], k=12)).strip().replace("${", "$") for _ in range(20)]
    for name in [*NASTY, *random_ones]:
        words = ["--sbatch=--hold", f"--sbatch=--comment=c {name}", f"--name={name}", f"--account={name}"]
        job = submit(cluster, site, "demo", *words, *packs(digits), f"name={name.replace('$', '')}x")
        shown = cluster.command("squeue", "-h", "-j", job, "-o", "%j\t%k\t%a").stdout
        script = cluster.command("scontrol", "write", "batch_script", job, "-").stdout
        cluster.command("scancel", job)
        assert shown.rstrip("\n").split("\t") == [name, f"c {name}", name.lower()]
        values = script[script.index("# --- filled in by") : script.index("\n# --- end\n")]
        say = 'printf "%s\\n" "$NAME" "${SETTINGS[@]}"'
        read = cluster.command("bash", "-euc", f"{values}\n{say}").stdout.splitlines()
        assert read == [name, *packs(digits), f"name={name.replace('$', '')}x"]
