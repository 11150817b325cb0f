#!/usr/bin/env python3
"""Fill in a job script, and print or submit it.

  jobs/submit.py demo --dry-run data.train=digits.h5 data.holdout=0.2         prints the script of a first try
  jobs/submit.py imagenet21k_r152x4 --nodes 64 data.train=$DATA/in21k.h5      pre-training; resumes and requeues itself
  jobs/submit.py finetune:natural --nodes 4 from=$RUNS/a,$RUNS/b shots=1,10,full seed=0,1,2 data.train=… data.test=…
  jobs/submit.py sweep:transfer.yaml --nodes 8        all runs of a sweep file, shared by 8 nodes
  jobs/submit.py scaling --nodes 256 -- --model R152x4 --batch 16             1, 4, 8, … GPUs, measured
  jobs/submit.py pack --nodes 1 -- /data/imagenet/train $DATA/train.h5 --workers 48

--dry-run prints the script. Clusters: jobs/clusters.yaml; JUWELS Booster where its name is found, else generic.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml

from engine.config.loading import load, variants
from engine.config.schema import FinetuneConfig, PretrainConfig
from loaders.arguments import COUNT, Number, as_place, expanded, program
from loaders.errors import UserError
from loaders.output import as_command

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = not (ROOT / "setup.py").is_file()
"""Whether this is no checkout: then jobs run where they are submitted, and take what is installed here."""
SWEPT = ("from", "shots", "seed")
STARTUP = 45  # seconds until a task listens for the signal: a tenth of that on an idle node


def read_cluster(name: str) -> dict[str, Any]:
    """A cluster of jobs/clusters.yaml, or of a YAML file with one cluster's keys."""
    known = yaml.safe_load((ROOT / "jobs" / "clusters.yaml").read_text(encoding="utf-8"))
    if name in known:
        return known[name]
    if not Path(name).is_file():
        raise UserError(f"cluster {name!r} is neither a file nor one of {', '.join(known)}")
    try:
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{name} is not readable YAML: {str(error).splitlines()[0]}") from error
    kinds = {key: type(value) for key, value in known["generic"].items()} | {"visible": str}
    if not isinstance(content, dict) or set(content) - set(kinds):
        raise UserError(f"{name} must hold the keys {', '.join(sorted(kinds))}")
    for key, value in content.items():
        optional = key in ("mpi", "visible") and value is None
        of_words = isinstance(value, list) and not all(isinstance(word, str) for word in value)
        if not optional and (type(value) is not kinds[key] or of_words or (kinds[key] is int and value < 1)):
            wanted = {int: "a number, 1 or more", list: "a list of words in brackets"}.get(
                kinds[key], "a text in quotes"
            )
            raise UserError(f"{name}: {key} is {value!r}; expected {wanted}")
    return known["generic"] | {"mpi": None} | content


def script(arguments: argparse.Namespace) -> str:
    """The filled-in job script. UserError for what could not run."""
    cluster = read_cluster(arguments.cluster)
    check_words(arguments, cluster)
    if not 1 <= arguments.nodes <= cluster["max_nodes"]:
        raise UserError(f"--nodes is {arguments.nodes}; 1 to {cluster['max_nodes']} are possible here")
    options = {
        "nodes": arguments.nodes,
        "ntasks-per-node": cluster["tasks_per_node"],
        "cpus-per-task": cluster["cpus_per_task"],
        "time": arguments.time or cluster["time"],
    }
    values: dict[str, str | list[str]] = {"CLUSTER_ENV": cluster["env"], "MPI_TYPE": cluster.get("mpi") or ""}
    values["STAGE"] = arguments.stage or ""
    if INSTALLED:
        if arguments.stage or arguments.what == "scaling":
            raise UserError("--stage and scaling need a checkout of the project; this is an installed copy")
        values["VENV"] = sys.prefix
    whole_node = {"VISIBLE": cluster.get("visible") or ""}
    what, _, recipe = arguments.what.rpartition(":")
    tasks = arguments.nodes * cluster["tasks_per_node"]
    if what == "finetune":
        template = "finetune"
        sweep = [text for text in arguments.settings if text.partition("=")[0] in SWEPT]
        rest = [text for text in arguments.settings if text not in sweep]
        runs = variants(sweep, SWEPT)
        if spaced := [text for run in runs for text in run if " " in text]:
            raise UserError(f"{spaced[0]!r} holds a space, which the sweep's list cannot; rename or link the file")
        for run in runs:
            load(FinetuneConfig, recipe, [*run, *rest], "finetune")
        nodes_needed = -(-len(runs) // cluster["tasks_per_node"])
        options |= {"nodes": 1, "array": f"0-{min(arguments.nodes, nodes_needed) - 1}"}
        name = arguments.name or f"finetune-{Path(recipe).stem if '/' in recipe else recipe}"
        values |= {"RECIPE": recipe, "NAME": name, "SETTINGS": rest, "STEP_OPTIONS": cluster["step"],
                   "RUNS_OF_SWEEP": [" ".join(run) for run in runs]}  # fmt: skip
    elif what == "sweep":
        from engine.transfer import sweep_file  # imports torch, which the other jobs need not wait for

        file = Path(expanded(recipe)).resolve()
        with contextlib.chdir(home()):  # where the job runs: its paths start there
            swept = sweep_file.read(file).runs
        if arguments.settings:
            raise UserError(f"{arguments.settings[0]!r}: a sweep's settings stand in {recipe}, under set: or a target")
        template, name = "sweep", arguments.name or file.stem
        nodes_needed = -(-len(swept) // cluster["tasks_per_node"])
        options |= {"nodes": 1, "array": f"0-{min(arguments.nodes, nodes_needed) - 1}"}
        values |= {"SWEEP": str(file), "STEP_OPTIONS": cluster["step"]}
    elif what:
        raise UserError(f"{arguments.what!r}: before the colon stands finetune, sweep, or nothing")
    elif recipe == "scaling":
        template, name = "single", arguments.name or "scaling"
        result = f"scaling-{tasks}"
        values |= whole_node
        values["COMMAND"] = ["python", "bench/scaling.py", "--gpus", str(tasks), "--json", f"{result}.json",
                             "--plot", f"{result}.png", *arguments.settings]  # fmt: skip
    elif recipe == "pack":
        template, name = "single", arguments.name or "pack"
        values |= whole_node
        values["COMMAND"] = ["python", "-m", "loaders.pack", *arguments.settings]
        options |= {"ntasks-per-node": 1, "cpus-per-task": cluster["tasks_per_node"] * cluster["cpus_per_task"]}
    else:
        template = "pretrain"
        config = load(PretrainConfig, recipe, arguments.settings, "pretrain")
        check_batch(config, tasks)
        name = arguments.name or config.name
        values |= {"RECIPE": recipe, "NAME": name, "SETTINGS": arguments.settings} | whole_node
        values["RESTARTS"] = "" if arguments.restarts is None else str(arguments.restarts)
        ahead = 300 if arguments.signal is None else arguments.signal
        if seconds(options["time"]) < ahead + STARTUP:
            raise UserError(
                f"--time is {options['time']}: the signal {ahead} s ahead of it would come before training has "
                f"begun; give {ahead + STARTUP} s or more, or a smaller --signal"
            )
        options["signal"] = f"USR1@{ahead}"
    if arguments.restarts is not None and template != "pretrain":
        raise UserError("--restarts is for pre-training, which goes on from its checkpoints")
    check_name(name)
    options["job-name"] = name
    more = [*cluster["sbatch"], *([f"--account={arguments.account}"] if arguments.account else []), *arguments.sbatch]
    text = (ROOT / "jobs" / f"{template}.sbatch").read_text(encoding="utf-8")
    if INSTALLED:
        text = text.replace("source jobs/common.sh", f"source {shlex.quote(str(ROOT / 'jobs' / 'common.sh'))}")
    return fill(text, options, more, values)


def home() -> Path:
    """Where a job runs, and its paths start."""
    return Path.cwd() if INSTALLED else ROOT


def check_words(arguments: argparse.Namespace, cluster: dict[str, Any]) -> None:
    """UserError for words that a job script cannot hold, or that would mean something else in one."""
    given = {"--time": [arguments.time or ""], "--account": [arguments.account or ""], "--name": [arguments.name or ""],
             "--stage": [arguments.stage or ""],
             "--sbatch": arguments.sbatch, "the recipe": [arguments.what], "settings": arguments.settings,
             "the cluster's words": [*map(str, cluster.values()), *cluster["sbatch"], *cluster["step"]]}  # fmt: skip
    for what, words in given.items():
        for word in words:
            if control := [character for character in word if not (character >= " " and character != "\x7f")]:
                raise UserError(f"{what}: {word!r} holds {control[0]!r}; a job script takes one line for each word")
    for word in arguments.sbatch:
        if not re.match(r"-\w\S|--[\w-]+(=|$)", word) or re.match(r"-\w\s", word):
            raise UserError(f"--sbatch {word!r}: expected one option, as in --sbatch=--qos=high, its value after a =")
    seconds(arguments.time or cluster["time"])


def check_name(name: str) -> None:
    """UserError for a name that a job, its log and its run folder cannot all have."""
    if "/" in name or "${" in name or name in (".", "..") or len(name.encode(errors="surrogateescape")) > 200:
        raise UserError(
            f"the name {name!r} is of the job, its log and its run folder; give a --name of no more than 200 bytes, "
            "without / and ${, and neither . nor .."
        )


def seconds(limit: str) -> int:
    """A time limit as Slurm has it (minutes, minutes:seconds, hours:minutes:seconds, days-hours:…) in seconds."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")] if re.fullmatch(r"(\d+-)?\d+(:\d+)*", limit, re.ASCII) else []
    first = 24 * 3600 * int(days) if parts and dash else 0
    if not 1 <= len(parts) <= 3:
        raise UserError(f"--time is {limit!r}; minutes, hours:minutes:seconds or days-hours:minutes:seconds expected")
    weights = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return first + sum(weight * part for weight, part in zip(weights, parts, strict=False))


def check_batch(config: PretrainConfig, tasks: int) -> None:
    """UserError unless the recipe's global batch can be shared out among the tasks; micro-batches of a size can."""
    shares = tasks * config.train.accumulate
    if config.train.micro_batch is None and config.train.global_batch % shares:
        raise UserError(
            f"train.global_batch={config.train.global_batch} cannot be shared out evenly among {tasks} tasks of "
            f"{config.train.accumulate} micro-batches; change --nodes, train.accumulate or train.global_batch"
        )
    if config.train.reproducible:
        from engine.optim.tree import check_ranks  # brings torch

        check_ranks(config.train.global_batch // int(config.train.micro_batch or 1), tasks)


def quoted(word: str) -> str:
    """A word of a #SBATCH line, as sbatch reads it: a backslash escapes, in quotes too, and # begins a comment."""
    if re.fullmatch(r"[\w@%+=:,./\[\]-]+", word, re.ASCII):
        return word
    escaped = word.replace("\\", r"\\").replace('"', r"\"")
    return f'"{escaped}"'


def fill(text: str, options: dict[str, Any], more: list[str], values: dict[str, str | list[str]]) -> str:
    """The template with these #SBATCH options and shell variables in place of its own."""
    lines = [
        f"{key}=({shlex.join(value)})" if isinstance(value, list) else f"{key}={shlex.quote(value)}"
        for key, value in values.items()
    ]
    head, tail = text.index("# --- filled in"), text.index("# --- end")
    text = text[:head] + "# --- filled in by jobs/submit.py\n" + "\n".join(lines) + "\n" + text[tail:]
    own = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    kept = [word for word in own if word.removeprefix("--").partition("=")[0] not in options]
    words = [*(f"--{key}={value}" for key, value in options.items()), *kept, *more]
    first, _, rest = text.partition("\n")
    rest = re.sub(r"\A(#SBATCH .*\n)+", "", rest)
    return "\n".join([first, *(f"#SBATCH {quoted(word)}" for word in words), rest])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog=program("jobs.submit", "jobs/submit.py"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    here = "juwels_booster" if "juwels" in os.environ.get("SYSTEMNAME", "") else "generic"
    add = result.add_argument
    add("what", metavar="RECIPE", help="a pre-training recipe, finetune:RECIPE, sweep:FILE, scaling, or pack")
    add("settings", nargs="*", metavar="key=value", help="settings of the recipe; words of the program after --")
    add(
        "--nodes",
        action=Number,
        within=COUNT,
        default=1,
        help="(%(default)s); of a fine-tuning sweep: at most at the same time",
    )
    add("--cluster", type=as_place, default=here, help="a name of jobs/clusters.yaml, or a file (%(default)s)")
    add("--time", help="time limit (the cluster's longest)")
    add(
        "--signal",
        action=Number,
        within=(0, 65_535),
        help="seconds before the time limit at which pre-training saves and requeues (300)",
    )
    add(
        "--restarts",
        action=Number,
        within=COUNT,
        help="start pre-training again within the job where it crashed or hung: so often without a newer checkpoint",
    )
    add("--stage", type=as_place, metavar="DIR", help="first copy environment and program to this folder of each node")
    add("--account", help="whose computing time it is")
    add("--name", help="of the job and the run folder (the recipe's)")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="another option of sbatch; may be repeated")
    add("--dry-run", action="store_true", help="print the script, submit nothing")
    return result


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    arguments = parser().parse_intermixed_args(argv)
    try:
        content = script(arguments).encode(errors="surrogateescape")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.dry_run:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)  # whatever the terminal is: people keep it in a file
        return 0
    try:
        return subprocess.run(["sbatch", f"--chdir={home()}"], input=content).returncode
    except FileNotFoundError:
        print("error: there is no sbatch here; --dry-run prints the script", file=sys.stderr)
        return 2


if __name__ == "__main__":
    as_command(main)
