"""How training scales from 1 to N GPUs: `python bench/scaling.py`.

  python bench/scaling.py --gpus 1024                     modelled, in seconds, where there are fewer
  srun python bench/scaling.py --gpus 64 --batch 128      measured, in an allocation of 64 tasks

Inside a Slurm allocation, or under a launcher such as mpirun, with enough tasks: measures, by launching a step of
each size. Elsewhere: models, and marks every row so. docs/scaling.md reads the table with you.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.model import plan
from bench.model import report as scaling_report
from bench.model.calibrate import FITTED, calibrate
from bench.model.facts import HERE, Cluster, Profile, Published, check_profile, number, read_cluster, read_profile
from bench.model.scaling import predict, sweep
from bench.model.whatif import at_precision, scaled, what_if
from engine.comm.launch import detect_launch
from engine.network import family
from engine.whole import write_json
from loaders.arguments import COUNT, SIDE, Number, as_path, as_picture, as_place
from loaders.errors import UserError, in_words
from loaders.output import as_command

USAGE_ERROR = 2


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python bench/scaling.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--gpus", action=Number, within=COUNT, default=1024, help="largest size (%(default)s)")
    add("--model", default="R152x4", help=f"{', '.join(family.MEMBERS)} (%(default)s)")
    add(
        "--batch",
        action=Number,
        within=COUNT,
        help="images per step on each GPU (modelled: the profile's; measured: 32)",
    )
    add("--precision", help="fp32, tf32, bf16, fp16 (modelled: the profile's; measured: bf16 on GPUs, fp32 on CPUs)")
    add(
        "--data",
        type=as_place,
        default="synthetic",
        help="synthetic, or a pack: then images/s with and without input (%(default)s)",
    )
    add("--size", action=Number, within=SIDE, default=224, help="side of the images, pixels (%(default)s)")
    add("--json", type=as_path, metavar="FILE", help="write all rows, hardware and profile")
    add(
        "--plot",
        type=as_picture,
        metavar="FILE",
        help="write the figure (modelled: else scaling.png)",
    )
    add("--page", type=as_path, metavar="FILE.html", help="write the table and its curves as a page without a server")
    add("--explain", action="store_true", help="show where the lost percent go at each size")
    modelling = result.add_argument_group("modelling")
    add = modelling.add_argument
    add(
        "--cluster",
        type=as_place,
        default="juwels_booster",
        help="a name from bench/model/clusters/, or a YAML file (%(default)s)",
    )
    add(
        "--profile",
        type=as_place,
        help="speed of one GPU: a name in bench/model/profiles/, or what bench/train_step.py --json wrote",
    )
    add("--facts", action="store_true", help="the cluster's facts alone: no calibration on published rows")
    add("--what-if", action="append", default=[], metavar="KEY=VALUE", help="change one thing; may be repeated")
    add("--plan", action="store_true", help="hours, GPU-hours and energy of the pre-training recipes")
    measuring = result.add_argument_group("measuring")
    add = measuring.add_argument
    add("--measure", action="store_true", help="measure on this machine, though nothing launched this program")
    add("--model-only", action="store_true", help="model, even where measuring is possible")
    add("--backend", default="auto", help="auto, horovod, torch: how ranks talk (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda (%(default)s)")
    add("--reproducible", action="store_true", help="sum gradients in one tree, as train.reproducible=true does")
    add("--slice-mib", action=Number, within=(0.001, 1e6), help="MiB of gradients that travel at once (measured: 32)")
    add("--warmup", action=Number, within=(0, 10**9), default=10, help="steps that do not count (%(default)s)")
    add("--steps", action=Number, within=COUNT, default=30, help="steps of a repeat (%(default)s)")
    add(
        "--repeats",
        action=Number,
        within=COUNT,
        default=5,
        help="repeats: median and spread are of these (%(default)s)",
    )
    return result


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    try:
        arguments = parser().parse_args(argv)
        family.member(arguments.model)
        if _measures(arguments):
            from bench.measured import scaling as scaling_measure  # brings torch

            scaling_measure.run(arguments)
        else:
            model(arguments)
    except BrokenPipeError:  # `… | head`
        raise
    except (UserError, OSError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        sys.exit(USAGE_ERROR)


def _measures(arguments: argparse.Namespace) -> bool:
    if arguments.model_only or arguments.plan:
        return False
    if arguments.measure:
        return True
    from bench.measured.steps import tasks  # what the launcher or allocation offers

    offered = tasks()
    if offered and offered < arguments.gpus and detect_launch().rank == 0:
        print(f"{offered} tasks here, {arguments.gpus} asked for: modelled, not measured\n")
    return offered >= arguments.gpus


def model(arguments: argparse.Namespace) -> None:
    """Print the modelled table; write what was asked for."""
    cluster, sources, published = read_cluster(arguments.cluster)
    profile = choose_profile(arguments, published, cluster)
    cluster, calibrated = _calibrated(arguments, cluster, published)
    unchanged = {step.gpus: step.images_per_second for step in sweep(profile, cluster, arguments.gpus)}
    paper = published if published and _subject(published) == (profile.network, profile.images_per_second) else None
    reference, label = (paper.rows, "paper") if paper else (None, "")
    for change in arguments.what_if:
        profile, cluster = what_if(change, profile, cluster)
    if arguments.what_if:
        reference, label = unchanged, "unchanged"
    rows = scaling_report.modelled(sweep(profile, cluster, arguments.gpus))
    print(_heading(profile, cluster, calibrated, arguments.what_if))
    print(scaling_report.table(rows, reference, label))
    if paper:
        print("\n" + scaling_report.contradiction(read_profile(paper.profile), read_cluster(arguments.cluster)[0]))
    if arguments.explain:
        print("\n" + scaling_report.explain(rows))
    if arguments.plan:
        print("\npre-training recipes on the GPUs they were published with, modelled:")
        print(plan.table(plan.plans(cluster)))
    if arguments.json:
        hardware = {name: {"value": value, "source": _source(name, sources, calibrated)}
                    for name, value in asdict(cluster).items() if name != "name"}  # fmt: skip
        content = {"rows": [row.as_json() for row in rows], "hardware": {"cluster": cluster.name, **hardware},
                   "profile": asdict(profile), "what_if": arguments.what_if, "calibrated": calibrated,
                   "published": paper.rows if paper else None, **_provenance()}  # fmt: skip
        write_json(arguments.json, content)
    place = arguments.plot or (None if arguments.json else Path("scaling.png"))
    if place:
        title = f"{profile.network}, {profile.batch} images a GPU, {profile.precision}, {cluster.name}: modelled"
        scaling_report.figure(rows, paper.rows if paper else None, place, title)
        print(f"\nfigure: {place}")
    if arguments.page:
        from bench.model.page import scaling_page  # brings what draws pages

        facts = {"command": _command(), "network": profile.network, "batch": f"{profile.batch} images a GPU",
                 "precision": profile.precision, "cluster": cluster.name,
                 "what if": ", ".join(arguments.what_if) or "–", "calibrated": calibrated or "no"}  # fmt: skip
        title = f"{profile.network} on {cluster.name}: modelled"
        size = scaling_page(rows, paper.rows if paper else None, arguments.page, title, facts)
        print(f"\npage: {arguments.page} ({size / 1e3:,.0f} kB)")


def _provenance() -> dict[str, Any]:
    """What a record carries besides its rows."""
    from bench.measured import timing  # brings torch, which a table alone need not wait for

    return {
        "commit": timing.commit(),
        "versions": {"python": timing.versions()["python"]},
        "command": _command(),
        "n": 1,
        "spread": "none: computed",
        "supports": ["modelled"],
    }


def _command() -> str:
    return shlex.join(["python", "bench/scaling.py", *sys.argv[1:]])


def choose_profile(arguments: argparse.Namespace, published: Published | None, cluster: Cluster) -> Profile:
    """The profile that was asked for; else the published one of the network; else one scaled from another network."""
    name = arguments.profile or published_profile(arguments.model, published)
    profile = read_profile(name)
    if not arguments.profile:
        if arguments.model != profile.network:
            profile = scaled(profile, arguments.model)
        if not cluster.gpu.name.startswith("a100-sxm4-40gb"):
            home, _, _ = read_cluster("juwels_booster")
            profile, _ = what_if(f"gpu={cluster.gpu.name}", profile, home)
    if arguments.batch is not None:
        profile = replace(profile, batch=number(arguments.batch, "--batch", zero=False, whole=True))
    if arguments.precision is not None:
        profile = at_precision(profile, cluster, arguments.precision)
    if arguments.slice_mib is not None:
        profile = replace(profile, slice_mib=number(arguments.slice_mib, "--slice-mib", zero=False, whole=False))
    if arguments.data != "synthetic":
        from loaders.packs.shard import Pack

        pack = Pack.open(arguments.data)
        profile = replace(profile, image_bytes=pack.image_bytes / len(pack))
    return check_profile(profile, name)


def published_profile(network: str, published: Published | None) -> str:
    """Name of the profile to start from: the published rows' own, else one of that network, else any."""
    if published and _subject(published)[0] == network:
        return published.profile
    named = {read_profile(path.stem).network: path.stem for path in sorted((HERE / "profiles").glob("*.yaml"))}
    return named.get(network, "r152x4_81h")


def _subject(published: Published) -> tuple[str, float]:
    profile = read_profile(published.profile)
    return profile.network, profile.images_per_second


def _calibrated(arguments: argparse.Namespace, cluster: Cluster, published: Published | None) -> tuple[Cluster, str]:
    if published is None or arguments.facts:
        return cluster, ""
    fitted = calibrate(read_profile(published.profile), cluster, published.rows, published.calibrate_up_to)
    return fitted, f"fitted to Table 2 up to {published.calibrate_up_to} GPUs (bench/model/calibrate.py)"


def _source(name: str, sources: dict[str, str], calibrated: str) -> str:
    return calibrated if calibrated and name in FITTED else sources[name]


def _heading(profile: Profile, cluster: Cluster, calibrated: str, changes: list[str]) -> str:
    parts = ", ".join(f"{name} {getattr(cluster, name):.4g}" for name in FITTED)
    one = predict(profile, cluster, 1)
    lines = [
        f"modelled: {profile.network}, {profile.batch} images a GPU, {profile.precision}; {cluster.name}: "
        f"{cluster.gpus_per_node} {cluster.gpu.name} a node",
        f"one GPU: {one.images_per_second:.2f} images/s; {profile.source}",
        f"{parts}: {calibrated or 'facts of the cluster file, nothing fitted'}",
    ]
    if changes:
        lines.append("what if: " + ", ".join(changes))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    as_command(main)
