"""Speed of one process's training step: `python bench/train_step.py --model R50x1`.

Images/s (median and spread), forward, backward and optimizer, the share of the peak that the counted FLOPs make (MFU),
and peak memory. Synthetic images, or a pack. `--json FILE` holds a profile that bench/scaling.py --profile takes.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.measured import timing
from bench.measured.training import Setup, build, from_pack, synthetic
from bench.measured.worker import measure
from bench.model.facts import number, read_gpu
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.network import family
from loaders.errors import UserError

USAGE_ERROR = 2
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


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return all that is known of it."""
    check_counts()
    comm = Communicator(Launch("alone"))
    gpu = torch.cuda.is_available() and arguments.device != "cpu"
    for name in ("batch", "size", "classes", "steps", "repeats"):
        number(getattr(arguments, name), f"--{name}", zero=False, whole=True)
    number(arguments.warmup, "--warmup", zero=True, whole=True)
    setup = Setup(
        network=arguments.model,
        batch=arguments.batch,
        precision=arguments.precision or ("bf16" if gpu else "fp32"),
        device=arguments.device,
        size=arguments.size,
        num_classes=arguments.classes,
        threads=arguments.threads,
    )
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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python bench/train_step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--model", default="R50x1", help=f"{', '.join(family.MEMBERS)} (%(default)s)")
    add("--batch", type=int, default=32, help="images per step (%(default)s)")
    add("--size", type=int, default=224, help="side of the images, pixels (%(default)s)")
    add("--classes", type=int, default=1000, help="outputs of the head (%(default)s)")
    add("--precision", choices=("fp32", "tf32", "bf16", "fp16"), help="bf16 on GPUs, fp32 on CPUs")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(%(default)s)")
    add("--data", default="synthetic", help="synthetic, or a pack (%(default)s)")
    add("--threads", type=int, default=2, help="decoding threads, for a pack (%(default)s)")
    add("--warmup", type=int, default=5, help="steps that do not count (%(default)s)")
    add("--steps", type=int, default=10, help="steps of a repeat (%(default)s)")
    add("--repeats", type=int, default=5, help="repeats: median and spread are of these (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all of it")
    return result


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    arguments = parser().parse_args(argv)
    try:
        family.member(arguments.model)
        result = run(arguments)
        print(describe(result))
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)


if __name__ == "__main__":
    main()
