"""How long a training step takes on N GPUs: pure functions of a profile, a cluster, and N.

    step(N) = max(step(1) + contention(N) + exposed(N) + stragglers(N), input(N))

* Gradients become ready along the backward pass, in proportion to counted FLOPs, from the head to the root. They
  travel in slices, one after another, as soon as each is whole. What is still under way when the backward pass ends
  is exposed.
* A slice takes the shorter of ring and tree by NCCL's own cost model (src/graph/tuning.cc): latency of the steps plus
  bytes over bandwidth, over NVLink within a node and all rails between nodes. A tree that spans cells of a dragonfly
  shares the links between two cells.
* Meanwhile the all-reduce moves its bytes through GPU memory, which delays the network's own kernels.
* A step ends when the slowest rank ends. GPUs differ for good (normal); nodes are delayed at random in each step
  (exponential). The expected largest of N is in closed form, or one integral.
* Input limits images/s: what a GPU's pipeline decodes, and what storage delivers to all.

Times are in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from bench.model.facts import Cluster, Profile
from engine.network import family
from loaders.errors import UserError

OPTIMIZER_BYTES = 20  # per parameter: read p, g, m; write p, m; fp32
RING_MEMORY_PASSES = 6  # times that a gradient crosses GPU memory in a ring: 3 in reduce-scatter, 3 in all-gather
FUSION_MEMORY_PASSES = 4  # copy into the fusion buffer, and back: a read and a write each


@dataclass(frozen=True)
class Step:
    """Where the time of a step on N GPUs goes."""

    gpus: int
    images: int  # of all GPUs together
    compute: float  # the step of one GPU that never waits for input
    contention: float
    exposed: float
    stragglers: float
    input: float  # time in which input delivers the images of a step
    one: float  # the step of one GPU, with its input

    @property
    def _trained(self) -> float:
        return self.compute + self.contention + self.exposed + self.stragglers

    @property
    def seconds(self) -> float:
        return max(self._trained, self.input)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def efficiency(self) -> float:
        """Percent of N times the speed of one."""
        return 100 * (self.one / self.seconds)

    def lost(self) -> dict[str, float]:
        """Percent of efficiency lost to each cause; with the efficiency they make 100.

        Where one GPU already waits for input, that wait hides what the other causes would cost.
        """
        causes = {name: getattr(self, name) for name in ("contention", "exposed", "stragglers")}
        total = sum(causes.values())
        felt = max(0.0, self._trained - self.one) / total if total else 0.0
        lost = {name: 100 * felt * value / self.seconds for name, value in causes.items()}
        return lost | {"input": 100 - self.efficiency - sum(lost.values())}


@dataclass(frozen=True)
class Phases:
    """Parts of the step of one GPU."""

    forward: float
    backward: float
    optimizer: float


def sizes(gpus: int, cluster: Cluster) -> list[int]:
    """The sweep: 1, a whole node, then doubling, and `gpus` itself. UserError for what the cluster does not have."""
    if gpus < 1:
        raise UserError(f"--gpus is {gpus}; 1 or more is expected")
    if gpus > cluster.gpus:
        raise UserError(
            f"--gpus is {gpus:,}, but {cluster.name} has {cluster.gpus:,} ({cluster.nodes:,} nodes of "
            f"{cluster.gpus_per_node}); take at most that, or another --cluster"
        )
    found, size = {1, gpus}, cluster.gpus_per_node
    while size < gpus:
        found.add(size)
        size *= 2
    return sorted(found)


def phases(profile: Profile, cluster: Cluster) -> Phases:
    """Forward, backward and optimizer on one GPU: as measured, else by FLOPs and by bytes moved."""
    step, cost = profile.step_seconds, family.cost(profile.network, profile.num_classes, profile.size)
    if profile.optimizer_share is not None:
        optimizer = profile.optimizer_share * step
    else:
        moved = OPTIMIZER_BYTES * cost.parameters / (1e9 * cluster.gpu.memory_gb_per_s)
        optimizer = min(moved, 0.5 * step)  # a rate that leaves less was not that of training
    if profile.forward_share is not None:
        forward = profile.forward_share * step
    else:
        forward = (step - optimizer) * cost.forward_flops / cost.training_flops
    return Phases(forward, step - optimizer - forward, optimizer)


def slices(profile: Profile) -> list[tuple[float, float]]:
    """(bytes, share of the backward pass after which they are ready) of each slice, in the order they travel."""
    return list(_slices(profile.network, profile.num_classes, profile.size, profile.gradient_bytes, profile.slice_mib))


@lru_cache(maxsize=64)
def _slices(
    network: str, num_classes: int, size: int, gradient_bytes: int, slice_mib: float
) -> tuple[tuple[float, float], ...]:
    layers = list(family.layers(network, num_classes, size))[::-1]
    total = sum(layer.backward_macs for layer in layers)
    found, pending, done = [], 0.0, 0
    for layer in layers:
        pending += layer.parameters * gradient_bytes
        done += layer.backward_macs
        if pending >= slice_mib * 2**20 or layer is layers[-1]:
            found.append((pending, done / total))
            pending = 0.0
    return tuple(found)


def all_reduce(size: float, gpus: int, cluster: Cluster) -> float:
    """Time to sum `size` bytes over `gpus` GPUs: the shorter of ring and tree."""
    if gpus == 1 or size == 0:
        return 0.0
    return min(ring(size, gpus, cluster), tree(size, gpus, cluster))


def ring(size: float, gpus: int, cluster: Cluster) -> float:
    """Ring all-reduce: 2(N-1) steps; each link carries 2(N-1)/N of the bytes."""
    nodes = _nodes(gpus, cluster)
    between = 2 * (nodes - 1)
    steps = 2 * (gpus - 1)
    latency = cluster.base_us + (steps - between) * cluster.nvlink_ring_us + between * cluster.network_us
    # A ring over the nodes in order crosses each boundary between cells once in each direction, on every rail.
    share = min(1.0, cluster.cell_links / cluster.rails) if nodes > cluster.nodes_per_cell else 1.0
    return 1e-6 * latency + size * steps / gpus / (1e9 * _bandwidth(nodes, cluster, share))


def tree(size: float, gpus: int, cluster: Cluster) -> float:
    """Double binary tree over the nodes, a chain within each: up and down once."""
    nodes = _nodes(gpus, cluster)
    within = min(gpus, cluster.gpus_per_node) - 1
    latency = cluster.base_us + 2 * (within * cluster.nvlink_tree_us + int(math.log2(nodes)) * cluster.network_us)
    share = 1.0
    if nodes > cluster.nodes_per_cell:
        # In-order trees: at most log2 of the smaller side's nodes edges cross a boundary, in each of the two trees.
        # Each tree carries half of the bytes, so at full speed an edge takes a quarter of a node's bandwidth.
        edges = 2 * math.ceil(math.log2(cluster.nodes_per_cell)) if cluster.nodes_per_cell > 1 else 2
        share = min(1.0, cluster.cell_links / (edges * cluster.rails / 4))
    speed = cluster.tree_efficiency * _bandwidth(nodes, cluster, share)
    return 1e-6 * latency + 2 * size / (1e9 * speed)


def _nodes(gpus: int, cluster: Cluster) -> int:
    return -(-gpus // cluster.gpus_per_node)


def _bandwidth(nodes: int, cluster: Cluster, share: float) -> float:
    """Of the narrowest link of a ring or tree, all rails together, GB/s; `share` of the rails' is to be had."""
    if nodes == 1:
        return cluster.gpu.nvlink_gb_per_s
    return min(cluster.gpu.nvlink_gb_per_s, cluster.rails * cluster.rail_gb_per_s * share)


def exposed(profile: Profile, cluster: Cluster, gpus: int) -> float:
    """How long after the end of the backward pass the last slice arrives."""
    if gpus == 1:
        return 0.0
    backward = phases(profile, cluster).backward
    free = 0.0
    for size, share in slices(profile):
        free = max(free, share * backward) + all_reduce(size, gpus, cluster)
    return max(0.0, free - backward)


def memory_time(profile: Profile, cluster: Cluster, gpus: int) -> float:
    """Time in which GPU memory could move what the all-reduce moves through it."""
    if gpus == 1:
        return 0.0
    gradients = family.cost(profile.network, profile.num_classes, profile.size).parameters * profile.gradient_bytes
    passes = RING_MEMORY_PASSES * (gpus - 1) / gpus + FUSION_MEMORY_PASSES * profile.fusion_copies
    return passes * gradients / (1e9 * cluster.gpu.memory_gb_per_s)


@lru_cache(maxsize=4096)
def slowest_normal(n: int) -> float:
    """Expected largest of n standard normal numbers: the integral of x d(Phi(x)^n)."""
    if n == 1:
        return 0.0
    x = np.linspace(-8.0, 10.0, 20_001)
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    below = np.cumsum(density) * (x[1] - x[0])
    return float(np.sum(n * x * density * np.clip(below, 0.0, 1.0) ** (n - 1)) * (x[1] - x[0]))


@lru_cache(maxsize=4096)
def slowest_exponential(n: int) -> float:
    """Expected largest of n exponential numbers of mean 1, less that mean: 1/2 + 1/3 + … + 1/n."""
    return math.fsum(1 / k for k in range(2, n + 1))


def stragglers(step: float, cluster: Cluster, gpus: int) -> float:
    """How much longer the slowest of all takes than the average one, whose step is `step`."""
    spread = cluster.gpu_spread * slowest_normal(gpus)
    jitter = cluster.node_jitter * slowest_exponential(_nodes(gpus, cluster))
    return step * (spread + jitter)


def input_seconds(profile: Profile, cluster: Cluster, gpus: int) -> float:
    """Time in which input can deliver the images of a step; 0 where nothing is known of it."""
    needed = [0.0]
    if profile.input_images_per_second is not None:
        needed.append(profile.batch / profile.input_images_per_second)
    if profile.image_bytes is not None:
        needed.append(gpus * profile.batch * profile.image_bytes / (1e9 * cluster.storage_gb_per_s))
    return max(needed)


def predict(profile: Profile, cluster: Cluster, gpus: int) -> Step:
    """The step on `gpus` GPUs."""
    if profile.at_gpus != 1:
        profile = on_one_gpu(profile, cluster)
    compute = profile.step_seconds
    return Step(
        gpus=gpus,
        images=gpus * profile.batch,
        compute=compute,
        contention=cluster.contention * memory_time(profile, cluster, gpus),
        exposed=exposed(profile, cluster, gpus),
        stragglers=stragglers(compute, cluster, gpus),
        input=input_seconds(profile, cluster, gpus),
        one=max(compute, input_seconds(profile, cluster, 1)),
    )


def sweep(profile: Profile, cluster: Cluster, gpus: int) -> list[Step]:
    """The step at each size up to `gpus`."""
    if profile.at_gpus != 1:
        profile = on_one_gpu(profile, cluster)
    return [predict(profile, cluster, size) for size in sizes(gpus, cluster)]


def on_one_gpu(profile: Profile, cluster: Cluster) -> Profile:
    """From the rate of a GPU among `at_gpus`, the rate alone with which the model gives that."""
    seen, low, high = profile.images_per_second, profile.images_per_second, 100 * profile.images_per_second
    one = replace(profile, at_gpus=1)
    for _ in range(60):
        middle = math.sqrt(low * high)
        step = predict(replace(one, images_per_second=middle), cluster, profile.at_gpus)
        low, high = (middle, high) if step.images_per_second / profile.at_gpus < seen else (low, middle)
    if high >= 99 * seen:
        raise UserError(
            f"{seen:.1f} images/s on each of {profile.at_gpus} GPUs is more than this cluster's network allows "
            "with any speed of one GPU; check the profile, or the cluster"
        )
    return replace(one, images_per_second=low)
