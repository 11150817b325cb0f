"""Change one thing of a profile or a cluster: `key=value`."""

from __future__ import annotations

import difflib
from dataclasses import fields, replace
from typing import Any

from bench.model.facts import MAY_BE_ZERO, PRECISIONS, WHOLE, Cluster, Gpu, Profile, check_profile, number, read_gpu
from engine.network import family
from loaders.errors import UserError

BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
CLUSTER_KEYS = [item.name for item in fields(Cluster) if item.type in ("int", "float")]
PROFILE_KEYS = [
    "batch",
    "images_per_second",
    "num_classes",
    "slice_mib",
    "gradient_bytes",
    "input_images_per_second",
    "image_bytes",
]
OTHER_KEYS = ["gpu", "gradients", "precision", "fusion_copies"]


def what_if(text: str, profile: Profile, cluster: Cluster) -> tuple[Profile, Cluster]:
    """Profile and cluster with `text`, "key=value", applied. UserError for an unknown key or an impossible value.

    gpu=h100: rates of that GPU; gradients=bf16: bytes on the wire; precision=bf16: see `at_precision`;
    fusion_copies=false; else a number of the profile (slice_mib=16, batch=32) or of the cluster (rails=2).
    """
    key, equals, value = text.partition("=")
    if not equals or not value:
        raise UserError(f"--what-if {text!r} is not key=value; for example slice_mib=16, gradients=bf16, gpu=h100")
    if key == "gpu":
        gpu = read_gpu(value)
        return on_gpu(profile, cluster, gpu), replace(cluster, gpu=gpu)
    if key == "gradients":
        _one_of(key, value, ("fp32", "bf16", "fp16"))
        return replace(profile, gradient_bytes=BYTES[value]), cluster
    if key == "precision":
        return at_precision(profile, cluster, value), cluster
    if key == "fusion_copies":
        _one_of(key, value, ("true", "false"))
        return replace(profile, fusion_copies=value == "true"), cluster
    if key in PROFILE_KEYS:
        found = _number(key, value)
        whole = key in ("batch", "num_classes", "gradient_bytes")
        changed: dict[str, Any] = {key: int(found) if whole else found}
        return check_profile(replace(profile, **changed), "--what-if"), cluster
    if key in CLUSTER_KEYS:
        found = number(_number(key, value), f"--what-if {key}", key in MAY_BE_ZERO, key in WHOLE)
        return profile, replace(cluster, **{key: found})
    known = [*OTHER_KEYS, *PROFILE_KEYS, *CLUSTER_KEYS]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    raise UserError(f"--what-if {key}: unknown; the nearest known key is {near}; there are {', '.join(known)}")


def on_gpu(profile: Profile, cluster: Cluster, gpu: Gpu) -> Profile:
    """The profile on another GPU: faster by the ratio of memory bandwidths, the smaller one of the two ratios that
    matter: group norms are bound by memory, and no measurement on that GPU is at hand."""
    memory = gpu.memory_gb_per_s / cluster.gpu.memory_gb_per_s
    compute = gpu.tflops[profile.precision] / cluster.gpu.tflops[profile.precision]
    return replace(
        profile,
        images_per_second=profile.images_per_second * min(memory, compute),
        source=f"estimate: {profile.source}; scaled to {gpu.name} by min(memory {memory:.2f}, compute {compute:.2f})",
    )


def at_precision(profile: Profile, cluster: Cluster, precision: str) -> Profile:
    """The profile in another precision: activations of half the bytes move in half the time, up to the peak."""
    _one_of("precision", precision, PRECISIONS)
    if precision == profile.precision:
        return profile
    rate = profile.images_per_second * BYTES[profile.precision] / BYTES[precision]
    flops = family.cost(profile.network, profile.num_classes, profile.size).training_flops
    peak = 1e12 * cluster.gpu.tflops[precision] / flops
    return replace(
        profile,
        precision=precision,
        images_per_second=min(rate, peak),
        source=f"estimate: {profile.source}; from {profile.precision} to {precision} by the bytes of activations",
    )


def scaled(profile: Profile, network: str) -> Profile:
    """The profile of another network, by the FLOPs of an image: an estimate for networks that nobody measured here."""
    old = family.cost(profile.network, profile.num_classes, profile.size)
    new = family.cost(network, profile.num_classes, profile.size)
    return replace(
        profile,
        network=network,
        images_per_second=profile.images_per_second * old.training_flops / new.training_flops,
        source=f"estimate: {profile.source}; scaled from {profile.network} by FLOPs",
    )


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key}={value}: it takes one of {', '.join(choices)}")


def _number(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UserError(f"{key}={value}: a number is expected") from None
