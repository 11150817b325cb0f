"""What the scaling model is told: a cluster, its GPU, and how fast one GPU trains. Read from YAML or JSON, checked."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from engine.network import family
from loaders.errors import UserError

HERE = Path(__file__).parent
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
MAY_BE_ZERO = ("base_us", "nvlink_ring_us", "nvlink_tree_us", "network_us", "contention", "gpu_spread", "node_jitter")
WHOLE = ("nodes", "gpus_per_node", "rails", "nodes_per_cell", "cell_links")


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet."""

    name: str
    tflops: dict[str, float]  # peak by precision, TFLOP/s
    memory_gb_per_s: float  # bandwidth of its memory
    nvlink_gb_per_s: float  # to the other GPUs of the node, per direction


@dataclass(frozen=True)
class Cluster:
    """A cluster; bandwidths in GB/s (1e9) per direction, latencies in microseconds."""

    name: str
    gpu: Gpu
    nodes: int
    gpus_per_node: int
    rails: int  # network adapters of a node
    rail_gb_per_s: float
    nodes_per_cell: int  # of the dragonfly: within a cell any node reaches any other at full speed
    cell_links: int  # of a rail's speed, between each two cells
    base_us: float  # start of an all-reduce
    nvlink_ring_us: float  # one step over NVLink in a ring
    nvlink_tree_us: float  # one step over NVLink in a tree
    network_us: float  # one step over the network
    tree_efficiency: float  # share of the bandwidth that a tree reaches
    contention: float  # share of the all-reduce's memory traffic that delays computation
    gpu_spread: float  # standard deviation of the speed of one GPU among its like, relative; lasting
    node_jitter: float  # mean of a node's random delay in each step, share of the step; exponential
    storage_gb_per_s: float  # what the file system delivers to one job
    watts_per_gpu: float  # with its share of the node

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Published:
    """Published rows for a cluster."""

    rows: dict[int, float]  # GPUs → images/s
    profile: str
    calibrate_up_to: int


@dataclass(frozen=True)
class Profile:
    """How one GPU trains, measured by bench/train_step.py or given."""

    network: str
    precision: str
    batch: int  # images per step on each GPU
    images_per_second: float  # of one GPU
    source: str
    num_classes: int = 1000
    size: int = 224  # pixels
    at_gpus: int = 1  # how many GPUs trained when this rate was seen
    slice_mib: float = 32.0  # gradients that travel at once
    gradient_bytes: int = 4  # per parameter, on the wire
    fusion_copies: bool = False  # whether gradients are copied into a buffer and back, as by Horovod's optimizer
    forward_share: float | None = None  # of the step; none: by counted FLOPs
    optimizer_share: float | None = None  # of the step; none: by the bytes that it moves
    input_images_per_second: float | None = None  # that one GPU's pipeline delivers; none: enough
    image_bytes: float | None = None  # mean encoded image; none: input is not limited by storage

    @property
    def step_seconds(self) -> float:
        return self.batch / self.images_per_second


def read_cluster(place: str) -> tuple[Cluster, dict[str, str], Published | None]:
    """The cluster of a name in model/clusters/ or a YAML file; where its values come from; published rows, if any."""
    path = _find(place, "clusters", "cluster")
    content = _mapping(path)
    gpus = _mapping(HERE / "clusters" / "gpus.yaml")
    _known(content, {"name", "about", "gpu", "published", "facts"}, path)
    gpu = read_gpu(str(content.get("gpu")), gpus, path)
    names = [item.name for item in fields(Cluster) if item.name not in ("name", "gpu")]
    facts = content.get("facts") or {}
    if not isinstance(facts, dict):
        raise UserError(f"{path}: facts holds {type(facts).__name__}, not name: {{value: …, source: …}} pairs")
    _known(facts, set(names), path)
    if missing := [name for name in names if name not in facts]:
        raise UserError(f"{path} lacks {', '.join(missing)}; see bench/model/clusters/juwels_booster.yaml")
    values: dict[str, Any] = {}
    sources = {"gpu": str(gpus[gpu.name]["source"])}
    for name in names:
        fact = facts[name]
        if not isinstance(fact, dict) or set(fact) != {"value", "source"} or not str(fact["source"]).strip():
            raise UserError(f"{path}: {name} needs {{value: a number, source: where it is from}}, found {fact!r}")
        values[name] = number(fact["value"], f"{path}: {name}", name in MAY_BE_ZERO, name in WHOLE)
        sources[name] = str(fact["source"])
    cluster = Cluster(name=str(content.get("name", path.stem)), gpu=gpu, **values)
    return cluster, sources, _published(content.get("published"), path)


def read_gpu(name: str, gpus: dict[str, Any] | None = None, path: Path | None = None) -> Gpu:
    """The GPU of that name in bench/model/clusters/gpus.yaml; the start of a name will do where it is one GPU's."""
    gpus = gpus or _mapping(HERE / "clusters" / "gpus.yaml")
    found = [key for key in gpus if key == name] or [key for key in gpus if key.startswith(name.lower())]
    if not found:
        raise UserError(f"{path or 'gpu'}: no GPU is called {name!r}; there are {', '.join(gpus)}")
    values = gpus[found[0]]
    return Gpu(found[0], dict(values["tflops"]), values["memory_gb_per_s"], values["nvlink_gb_per_s"])


def read_profile(place: str) -> Profile:
    """The profile of a name in model/profiles/, or a YAML or JSON file such as `bench/train_step.py --json` writes."""
    path = _find(place, "profiles", "profile")
    content = _mapping(path)
    content = content.get("profile", content)
    known = {item.name: item for item in fields(Profile)}
    _known(content, set(known), path)
    if missing := [name for name, item in known.items() if item.default is MISSING and name not in content]:
        raise UserError(f"{path} lacks {', '.join(missing)}; see bench/model/profiles/table2_r152x4.yaml")
    return check_profile(Profile(**content), str(path))


def check_profile(profile: Profile, where: str) -> Profile:
    """The same profile, with whole numbers as such. UserError for what no GPU can have."""
    family.member(profile.network)
    if profile.precision not in PRECISIONS:
        raise UserError(f"{where}: precision is {profile.precision!r}; there are {', '.join(PRECISIONS)}")
    for name in ("batch", "num_classes", "size", "at_gpus", "gradient_bytes"):
        number(getattr(profile, name), f"{where}: {name}", zero=False, whole=True)
    for name in ("images_per_second", "slice_mib", "input_images_per_second", "image_bytes"):
        if (value := getattr(profile, name)) is not None:
            number(value, f"{where}: {name}", zero=False, whole=False)
    shares = [value for value in (profile.forward_share, profile.optimizer_share) if value is not None]
    for value in shares:
        number(value, f"{where}: share of the step", zero=True, whole=False)
    if sum(shares) >= 1:
        raise UserError(
            f"{where}: forward and optimizer take {sum(shares):.0%} of the step; nothing is left for backward"
        )
    return profile


def number(value: Any, what: str, zero: bool, whole: bool) -> Any:
    """`value` as a finite number that is not negative, and not 0 unless `zero`. UserError otherwise."""
    least = "0 or more" if zero else "more than 0"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{what} is {value!r}; a number, {least}, is expected")
    if value < 0 or (value == 0 and not zero):
        raise UserError(f"{what} is {value}; it must be {least}")
    if whole and value != int(value):
        raise UserError(f"{what} is {value}; a whole number is expected")
    return int(value) if whole else value


def read_rows(path: Path) -> dict[int, float]:
    """GPUs → images/s of a CSV file with columns gpus and images_per_second."""
    head, *lines = path.read_text(encoding="utf-8").split()
    columns = head.split(",")
    rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines]
    return {int(row["gpus"]): float(row["images_per_second"]) for row in rows}


def _published(content: Any, path: Path) -> Published | None:
    if content is None:
        return None
    _known(content, {"rows", "profile", "calibrate_up_to"}, path)
    return Published(read_rows(HERE / content["rows"]), content["profile"], content["calibrate_up_to"])


def _find(place: str, folder: str, what: str) -> Path:
    known = {path.stem: path for path in sorted((HERE / folder).glob("*.yaml")) if path.stem != "gpus"}
    path = known.get(place) or Path(place)
    if not path.is_file():
        near = difflib.get_close_matches(place, known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{what} {place!r} is neither a file nor one of {', '.join(known)}{hint}")
    return path


def _mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not names and values")
    return content


def _known(content: dict[str, Any], names: set[str], path: Path) -> None:
    for key in content:
        if key not in names:
            near = difflib.get_close_matches(str(key), sorted(names), n=1, cutoff=0.0)
            raise UserError(f"{path}: unknown key {key}; the nearest known one is {near[0]}")
