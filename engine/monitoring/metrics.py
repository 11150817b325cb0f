"""What a run leaves for people: a line per event (JSONL), TensorBoard, and the environment it ran in."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.comm.communicator import Communicator
from engine.whole import json_text, may_wait, mend_last_line
from loaders.errors import told

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from engine.monitoring.tracking import Tracker

PACKAGES = (
    "torch", "torchvision", "nvidia-dali-cuda130", "horovod", "mpi4py", "h5py", "numpy", "safetensors", "omegaconf",
)  # fmt: skip

_CODE = (":/engine", ":/loaders", ":/csrc", ":/jobs", ":/setup.py")
_NEEDED = {"train": {"loss", "learning_rate"}, "val": {"loss"}, "save": {"stall_s", "write_s"}}
_LOG = logging.getLogger(__name__)


class MetricLog:
    """Appends metrics to RUN/metrics.jsonl and RUN/tensorboard.

    first_step: completed steps at which the run goes on. What TensorBoard has of later ones, from before a kill, it
    forgets; what it has up to there is not written twice. majority: share of the evaluation set's most frequent class,
    percent, which the curves show. tracker: where they go, too.
    """

    def __init__(
        self, folder: Path, first_step: int, majority: float | None = None, tracker: Tracker | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        with open(self.path, "a+b") as file:
            mend_last_line(file)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the run
        self._first, self.majority, self._tracker = first_step, majority, tracker
        self._folder = folder / "tensorboard"
        self._lines = b""
        self._points: list[tuple[str, float, int]] = []
        self._board: SummaryWriter | None = None

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One event: `kind` is "train", "val" or "save", `step` the number of completed steps.

        What a full disk does not take is kept, and written with the next one.
        """
        self._lines += (json_text({"kind": kind, "step": step, **values}) + "\n").encode()
        if step > self._first:
            self._points += [(f"{kind}/{name}", value, step) for name, value in values.items()]
            if self._tracker is not None:
                self._tracker.write(kind, step, values)
        self._flush("training goes on, and writes it with the next event")

    def _flush(self, then: str) -> None:
        with may_wait(self.path, then):
            while self._lines:
                self._lines = self._lines[self._file.write(self._lines) :]
        with may_wait(self._folder, then):
            self._draw()

    def _draw(self) -> None:
        if not self._points:
            return
        try:
            if self._board is None:  # not before it is needed: a hundred files are read for it
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self._folder), purge_step=self._points[0][2])
            for point in self._points:
                self._board.add_scalar(*point)
            self._board.flush()
        except OSError:
            board, self._board = self._board, None  # its thread has ended: a new one draws all of it again
            with contextlib.suppress(OSError):
                if board is not None:
                    board.close()
            raise
        self._points.clear()

    def close(self) -> None:
        self._flush("the run ends without it")
        self._file.close()
        if self._tracker is not None:
            self._tracker.close()
        if self._board is not None:
            with may_wait(self._folder, "the run ends without it"):
                self._board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl, each step once: where a run was resumed, the later line counts.

    A line that is none, such as the one that a killed run was writing, is passed over, with a warning where others
    follow. SystemRefusal where the file cannot be read.
    """
    events: dict[tuple[str, int], dict[str, Any]] = {}
    with told(f"{path} cannot be read"):
        lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        event = _event(line)
        if event is not None:
            events[event["kind"], event["step"]] = event
        elif number < len(lines):
            _LOG.warning("%s, line %d is no event, and is passed over", path, number)
    return sorted(events.values(), key=lambda event: (event["step"], event["kind"]))


def _event(line: bytes) -> dict[str, Any] | None:
    """A line as it was written, with NaN where JSON has null; None where it is none."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or event.get("kind") not in _NEEDED or type(event.get("step")) is not int:
        return None
    found = {name: math.nan if value is None else value for name, value in event.items()}
    numbers = all(isinstance(value, int | float) for name, value in found.items() if name != "kind")
    return found if numbers and found.keys() >= _NEEDED[event["kind"]] else None


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
    """Commit of this code, with "+" where what runs was changed since; None outside a git checkout.

    A job that copied the tree to its nodes says it in BOOSTERBIT_COMMIT.
    """
    if told := os.environ.get("BOOSTERBIT_COMMIT"):
        return told
    here = Path(__file__).resolve().parent
    try:
        said = subprocess.run(
            # Unlike `describe` it reads nothing of the history.
            ["git", "status", "--porcelain=v2", "--branch", "--no-ahead-behind", "--untracked-files=no", "--", *_CODE],
            cwd=here, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True,
        ).stdout.splitlines()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    found = next((line.split()[-1][:12] for line in said if line.startswith("# branch.oid ")), None)
    return found and found + ("+" if any(not line.startswith("#") for line in said) else "")


def processor() -> str:
    """Name of the CPU, with its family and model: a virtual machine's may be called just "AMD EPYC"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    said: dict[str, str] = {}
    for key, _, value in (line.partition(":") for line in lines):
        said.setdefault(key.strip(), value.strip())
    if "model name" in said:
        numbers = [f"{key.removeprefix('cpu ')} {said[key]}" for key in ("cpu family", "model") if key in said]
        return said["model name"] + (f" ({', '.join(numbers)})" if numbers else "")
    return platform.processor() or platform.machine()
