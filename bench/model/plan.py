"""Hours, GPU-hours and energy of the pre-training recipes, by the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import yaml

from bench.model.facts import HERE, Cluster, read_profile
from bench.model.scaling import on_one_gpu, predict
from engine.config.loading import load, recipes
from engine.config.schema import PretrainConfig


@dataclass(frozen=True)
class Plan:
    """What a recipe takes on `gpus` GPUs."""

    recipe: str
    gpus: int
    images_per_second: float
    hours: float
    megawatt_hours: float
    profile: str

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.gpus


def plan(recipe: str, cluster: Cluster, gpus: int | None = None) -> Plan | None:
    """The plan of a recipe, on the GPUs it was published with unless given; None for a recipe without known data."""
    known = yaml.safe_load((HERE / "plan.yaml").read_text(encoding="utf-8"))
    config = load(PretrainConfig, recipe, ["data.train=unknown"], "pretrain")
    parts = [part for part in config.name.split("_") if part in known["images"]]
    network = config.model.name
    if not parts or network not in known["profiles"] or config.schedule.epochs is None:
        return None
    kind = "xray" if config.data.augment == "xray" else "natural"
    gpus = gpus or known["gpus"][kind][network]
    name = known["profiles"][network]
    profile = read_profile(name)
    # A rate is of images, whatever the head and the batch: both change little of the work for one.
    step = predict(
        replace(on_one_gpu(profile, cluster), batch=max(1, config.train.global_batch // gpus)), cluster, gpus
    )
    images = config.schedule.epochs * sum(known["images"][part] for part in parts)
    hours = images / step.images_per_second / 3600
    return Plan(recipe, gpus, step.images_per_second, hours, 1e-6 * hours * gpus * cluster.watts_per_gpu, name)


def plans(cluster: Cluster) -> list[Plan]:
    """The plans of all recipes that have one."""
    found = (plan(name, cluster) for name in recipes("pretrain"))
    return sorted((one for one in found if one), key=lambda one: -one.gpu_hours)


def table(found: list[Plan]) -> str:
    """The plans for people."""
    width = max(len(one.recipe) for one in found)
    lines = [f"{'recipe':{width}} {'GPUs':>6} {'images/s':>10} {'hours':>8} {'GPU-hours':>10} {'MWh':>7}  rate from"]
    for one in found:
        lines.append(
            f"{one.recipe:{width}} {one.gpus:6} {one.images_per_second:10,.0f} {one.hours:8.1f} "
            f"{one.gpu_hours:10,.0f} {one.megawatt_hours:7.2f}  {one.profile}"
        )
    return "\n".join(lines)
