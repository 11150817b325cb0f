"""The line that a fine-tuning run leaves behind: what it holds, what identifies it, and how it is appended."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from engine.comm.communicator import Communicator
from engine.config.schema import AUTO, FinetuneConfig
from engine.whole import file_system, json_text, mend_last_line
from loaders.errors import in_words, told

if TYPE_CHECKING:
    from engine.training import assemble
    from engine.transfer.plan import Plan

_LINE = 1 << 16  # bytes that a line may have


def result_line(
    config: FinetuneConfig,
    plan: Plan,
    parts: assemble.Parts,
    folder: Path | None,
    scores: dict[str, float],
    comm: Communicator,
) -> dict:
    """One result with the columns of the published results, and what else identifies the run."""
    from engine.monitoring import metrics
    from engine.training.evaluate import NEVER, OF_CLASS

    metric = "mean_auc" if "mean_auc" in scores else "top1"
    return {
        "metric_value": scores[metric],
        "metric": metric,
        "path": "" if folder is None else str(folder),
        "seed": config.seed,
        "shot": config.shots,
        "pretrained_model": plan.source,
        "dataset": plan.dataset,
        "last_step": plan.times.total_steps,
        "network": plan.network,
        "weights": plan.weights,
        "recipe": config.name,
        "train_images": plan.train_images,
        "test_images": int(scores["images"]),
        "majority": parts.majority,
        "test_loss": scores["loss"],
        "test_top1": scores.get("top1"),
        "auc_classes": scores.get("auc_classes"),
        "interval": [scores["low"], scores["high"]],
        "classes": {name[len(OF_CLASS) :]: value for name, value in scores.items() if name.startswith(OF_CLASS)},
        "never_predicted": [name[len(NEVER) :] for name in scores if name.startswith(NEVER)],
        "short_classes": plan.short,
        "size": parts.about["size"],
        "mixup": plan.mixup,
        "settings": fingerprint(config),
        "ranks": comm.size,
        "commit": metrics.commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def fingerprint(config: FinetuneConfig) -> str:
    """Equal for two configurations that give the same result: where it goes, and how fast, are left out."""
    plain = dataclasses.asdict(config)
    for key in (
        "about",
        "folder",
        "results",
        "resume",
        "device",
        "log_every",
        "graph",
        "recompute",
        "async_save",
        "tracking",
        "accumulate",
        "micro_batch",
        "reproducible",
        "bad_steps",
        "checkpoint_every",
    ):
        del plain[key]
    plain["gradients"] = plain.pop("comm")["gradients"]  # what is rounded on its way comes to something else
    for key in ("backend", "decode", "region", "threads", "prefetch", "check", "bad_budget", "overlap"):
        del plain["data"][key]
    for key in ("folds", "fold"):  # of which earlier versions knew nothing
        if plain[key] is None:
            del plain[key]
    if not config.keep_best:  # what is looked at on the way changes nothing, but for images that are not trained on
        del plain["keep_best"], plain["eval_every"]
        if config.data.val_share is None:
            del plain["data"]["val"]
    if config.data.val_share is not None:  # in any spelling
        plain["data"]["val"] = config.data.val_share
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def run_folder(config: FinetuneConfig, plan: Plan, parts: assemble.Parts) -> Path | None:
    """Where a run keeps its network: as the configuration says; `auto`: beside its results, in a folder of a name that
    only the same run has, with the same settings, weights and images, so that it goes on there."""
    import numpy as np

    if config.folder != AUTO:
        return Path(config.folder) if config.folder else None
    known = hashlib.sha256(f"{fingerprint(config)} {plan.weights} {plan.network}".encode())
    for pack in (parts.feed.train, plan.scored.test):
        if pack is not None:
            known.update(pack.fingerprints.tobytes() + np.ascontiguousarray(pack.labels).tobytes())
    name = re.sub(r"[^\w.+-]+", "-", plan.dataset)[:80].strip("-.") or "run"
    return Path(config.results).parent / f"{name}-{config.shots.rstrip('%')}-{config.seed}-{known.hexdigest()[:8]}"


def check_writable(path: Path) -> None:
    """SystemRefusal where no line can be appended: asked before anything is trained, or its result would be lost.

    A file beside it is written, synced and removed: to be opened is not to have room.
    """
    probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
    with told(f"results={path} cannot be written; name another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # not every network file system can
            room = bytes(_LINE + file.tell())  # no file may be longer than the limit of a process
        try:
            with open(probe, "wb") as file:
                file.write(room)
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)


def append(path: Path, line: dict) -> None:
    """Append one line of JSON, after the last that is whole; runs that end at the same moment wait for each other.

    Where that fails, the line is printed and kept beside; `settle` appends it later, and so does the next call.
    """
    text = json_text(line).encode() + b"\n"
    try:
        settle(path)
        _append(path, text)
    except OSError as error:
        kept = _keep(path, text)
        print(
            f"warning: {path} cannot be written: {in_words(error, str(path))}; {file_system(path)}; the result is "
            f"{f'kept in {kept}, and appended when there is room' if kept else 'in this line only'}: {text.decode()}",
            end="", file=sys.stderr, flush=True,
        )  # fmt: skip


def settle(path: Path) -> None:
    """Append the results that had to be kept beside. OSError where there still is no room."""
    for place in _beside(path):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), open(place, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = file.read()
            if os.fstat(file.fileno()).st_uid == os.geteuid() and os.fstat(file.fileno()).st_nlink:
                _append(path, text[: text.rfind(b"\n") + 1])
                place.unlink()


def _append(path: Path, text: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not os.fstat(file.fileno()).st_nlink:
                continue  # another has just removed it, as `settle` does
            mend_last_line(file)
            end = file.seek(0, os.SEEK_END)
            try:
                while text:
                    text = text[file.write(text) :]
            except OSError:
                file.truncate(end)  # a part of a line is none
                raise
            return


def _beside(path: Path) -> list[Path]:
    """Where lines are kept: beside the results, or, since that disk is full, among temporary files."""
    known = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:12]
    return [path.with_name(f".{path.name}.kept"), Path(tempfile.gettempdir(), f"boosterbit-{os.getuid()}-{known}.kept")]


def _keep(path: Path, text: bytes) -> Path | None:
    for place in _beside(path):
        with contextlib.suppress(OSError):
            _append(place, text)
            return place
    return None
