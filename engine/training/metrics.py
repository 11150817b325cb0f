"""What a run leaves for people: a line per event (JSONL), TensorBoard, curves as PNG, and the environment it ran in."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from engine.comm.communicator import Communicator
from engine.whole import json_text

PACKAGES = (
    "torch", "torchvision", "nvidia-dali-cuda130", "horovod", "mpi4py", "h5py", "numpy", "safetensors", "omegaconf",
)  # fmt: skip


class MetricLog:
    """Appends metrics to RUN/metrics.jsonl and RUN/tensorboard."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115 - lives as long as the run
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One event: `kind` is "train" or "val", `step` the number of completed steps."""
        self._file.write(json_text({"kind": kind, "step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl, each step once: where a run was resumed, the later line counts."""
    events: dict[tuple[str, int], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # the line that a killed run was writing
            continue
        known = {name: math.nan if value is None else value for name, value in event.items()}  # JSON has no NaN
        events[event["kind"], event["step"]] = known
    return sorted(events.values(), key=lambda event: (event["step"], event["kind"]))


def plot_curves(metrics: Path, picture: Path, title: str) -> None:
    """Draw loss, learning rate, and evaluation scores over steps."""
    from matplotlib.figure import Figure

    events = read(metrics)
    train = [event for event in events if event["kind"] == "train"]
    val = [event for event in events if event["kind"] == "val"]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    loss, rate, score = figure.subplots(1, 3)
    loss.plot([e["step"] for e in train], [e["loss"] for e in train], label="training", lw=1)
    if val:
        loss.plot([e["step"] for e in val], [e["loss"] for e in val], "o-", ms=3, label="evaluation")
    loss.set(title="loss", xlabel="step")
    loss.legend()
    rate.plot([e["step"] for e in train], [e["learning_rate"] for e in train], lw=1)
    rate.set(title="learning rate", xlabel="step")
    for name in ("top1", "mean_auc"):
        points = [(e["step"], e[name]) for e in val if name in e]
        if points:
            score.plot(*zip(*points, strict=True), "o-", ms=3, label={"top1": "top-1", "mean_auc": "mean AUC"}[name])
            score.legend(loc="lower right")
    score.set(title="evaluation, %", xlabel="step")
    figure.suptitle(title)
    figure.savefig(picture, dpi=110)


def environment(comm: Communicator, device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit, and launch: what another person needs to repeat the run."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    versions["torch"] = torch.__version__  # with the build, which the package's metadata leaves out
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": commit(),
        "python": platform.python_version(),
        "versions": versions,
        "cuda": torch.version.cuda,
        "processor": processor(),
        "gpu": None if gpu is None else {"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)},
        "ranks": comm.size,
        "communicator": comm.name,
        "launched_by": comm.launch.by,
        "threads": torch.get_num_threads(),
    }


def commit() -> str | None:
    """Commit of this code, with "+" where the tree was changed since; None outside a git checkout."""
    here = Path(__file__).resolve().parent
    try:
        text = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return text or None


def processor() -> str:
    """Model name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
