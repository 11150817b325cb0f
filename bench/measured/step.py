"""What `bench/train_step.py` measures: the training step of one process."""

from __future__ import annotations

import argparse
import resource
import shlex
import sys
from typing import Any

import torch

from bench.measured import timing
from bench.measured.training import Setup, build, from_pack, synthetic
from bench.measured.worker import measure
from bench.model.facts import number, read_gpu
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.network import family
from loaders.errors import UserError

COUNTED = {"R50x1": 24.3, "R152x4": 1096.0}
"""GFLOP per training image at 224 px with 1,000 classes, as the project's protocol has it."""


def check_counts() -> None:
    """The counted FLOPs, on which MFU rests, are the known ones."""
    for name, expected in COUNTED.items():
        found = family.cost(name, 1000).training_flops / 1e9
        assert abs(found / expected - 1) < 0.002, f"{name}: {found:.1f} GFLOP counted, {expected} known"


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """FLOP/s that MFU is relative to, and what they are: a GPU's data sheet, else the fastest matrix product here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower().replace("nvidia ", "").replace(" ", "-")
        try:
            gpu = read_gpu(name)
        except UserError:
            return _fastest_product(device, precision)
        return 1e12 * gpu.tflops[precision], f"peak of the data sheet of {gpu.name}"
    return _fastest_product(device, precision)


def _fastest_product(device: torch.device, precision: str) -> tuple[float, str]:
    side = 8192 if device.type == "cuda" else 1024
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = timing.measure({"product": lambda: a @ b}, repeats=10, device=device)
    return 2 * side**3 / (1e-3 * times["product"].best), f"fastest of 10 {side}x{side} matrix products in this run"


def setup_of(arguments: argparse.Namespace) -> Setup:
    """What the command line asks for. UserError for numbers that cannot be."""
    gpu = torch.cuda.is_available() and arguments.device != "cpu"
    for name in ("batch", "size", "classes", "steps", "repeats"):
        number(getattr(arguments, name), f"--{name}", zero=False, whole=True)
    number(arguments.warmup, "--warmup", zero=True, whole=True)
    return Setup(
        network=arguments.model,
        batch=arguments.batch,
        precision=arguments.precision or ("bf16" if gpu else "fp32"),
        device=arguments.device,
        size=arguments.size,
        num_classes=arguments.classes,
        threads=arguments.threads,
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return all that is known of it."""
    check_counts()
    setup = setup_of(arguments)
    comm = Communicator(Launch("alone"))
    gpu = torch.cuda.is_available() and setup.device != "cpu"
    hardware = timing.hardware("cuda" if gpu else "cpu")  # with the load before we add to it
    trainer = build(setup, comm)
    device = trainer.flat.values.device
    peak, what = peak_flops(device, setup.precision)
    if arguments.data == "synthetic":
        source = synthetic(setup, comm, device)
    else:
        source = from_pack(arguments.data, setup, comm, device)
    found = measure(trainer, source, comm, arguments.warmup, arguments.steps, arguments.repeats)
    flops = family.cost(setup.network, setup.num_classes, setup.size).training_flops
    shares = found["share_percent"]
    busy = sum(shares[name] for name in ("forward", "backward", "optimizer"))
    reached = flops * found["images_per_second"]
    return {
        "profile": {
            "network": setup.network,
            "num_classes": setup.num_classes,
            "size": setup.size,
            "precision": setup.precision,
            "batch": setup.batch,
            "images_per_second": found["images_per_second"],
            "forward_share": shares["forward"] / busy,
            "optimizer_share": shares["optimizer"] / busy,
            "source": f"measured by bench/train_step.py on {hardware.get('gpu', hardware['cpu'])}",
        },
        "measured": found,
        "data": arguments.data,
        "gflop_per_training_image": flops / 1e9,
        "tflops_reached": reached / 1e12,
        "mfu_percent": 100 * reached / peak,
        "mfu_relative_to": {"tflops": peak / 1e12, "what": what},
        "peak_memory_gib": _peak_memory(device),
        "optimizer": trainer.optimizer.implementation,
        "hardware": hardware,
        "versions": timing.versions(),
        "n": found["repeats"],
        "spread": "lowest and highest of the repeats",
        "supports": ["training"],
        "commit": timing.commit(),
        "command": shlex.join(["python", "bench/train_step.py", *sys.argv[1:]]),
    }


def _peak_memory(device: torch.device) -> dict[str, float]:
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found


def describe(result: dict[str, Any]) -> str:
    """The result for people."""
    profile, found, hardware = result["profile"], result["measured"], result["hardware"]
    shares, step = found["share_percent"], found["step_milliseconds_per_rank"][0]
    memory = ", ".join(f"{value:.2f} GiB {name}" for name, value in result["peak_memory_gib"].items())
    return "\n".join(
        [
            f"{profile['network']}, {profile['batch']} images of {profile['size']} px, {profile['precision']}, "
            f"{result['data']} input, optimizer {result['optimizer']}",
            f"{hardware.get('gpu', hardware['cpu'])}, {hardware['threads']} threads, load before "
            f"{hardware['load_before']}; torch {result['versions']['torch']}; commit {result['commit'][:12]}",
            f"images/s    {found['images_per_second']:.2f} (median of {found['repeats']}, "
            f"{found['images_per_second_low']:.2f} to {found['images_per_second_high']:.2f})",
            f"step        {step['p50']:.1f} ms (p90 {step['p90']:.1f}, p99 {step['p99']:.1f})",
            "            " + ", ".join(f"{name} {shares[name]:.1f}%" for name in shares if name != "exposed"),
            f"FLOPs       {result['gflop_per_training_image']:.4g} GFLOP an image; "
            f"{result['tflops_reached']:.4g} TFLOP/s",
            f"MFU         {result['mfu_percent']:.1f}% of {result['mfu_relative_to']['tflops']:.4g} TFLOP/s: "
            f"{result['mfu_relative_to']['what']}",
            f"peak memory {memory}",
        ]
    )
