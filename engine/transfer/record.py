"""The line that a fine-tuning run leaves behind: what it holds, what identifies it, and how it is appended."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from engine.comm.communicator import Communicator
from engine.config.schema import FinetuneConfig
from engine.whole import json_text
from loaders.errors import UserError

if TYPE_CHECKING:
    from engine.training import assemble
    from engine.transfer.plan import Plan


def result_line(
    config: FinetuneConfig, plan: Plan, parts: assemble.Parts, scores: dict[str, float], comm: Communicator
) -> dict:
    """One result with the columns of the published results, and what else identifies the run."""
    from engine.training import metrics

    metric = "mean_auc" if "mean_auc" in scores else "top1"
    return {
        "metric_value": scores[metric],
        "metric": metric,
        "path": config.folder or "",
        "seed": config.seed,
        "shot": config.shots,
        "pretrained_model": plan.source,
        "dataset": plan.dataset,
        "last_step": plan.times.total_steps,
        "network": plan.network,
        "recipe": config.name,
        "train_images": plan.train_images,
        "test_images": int(scores["images"]),
        "test_loss": scores["loss"],
        "test_top1": scores.get("top1"),
        "auc_classes": scores.get("auc_classes"),
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
    for key in ("about", "folder", "results", "resume", "device", "log_every", "checkpoint_every", "comm"):
        del plain[key]
    for key in ("backend", "threads", "prefetch", "check", "bad_budget"):
        del plain["data"][key]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def check_writable(path: Path) -> None:
    """UserError where no line can be appended: asked before anything is trained, or its result would be lost."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # not every network file system can
    except OSError as error:
        raise UserError(f"results={path} cannot be written: {error.strerror}; name another file") from error


def append(path: Path, line: dict) -> None:
    """Append one line of JSON; runs that end at the same moment wait for each other.

    What a killed run left of a line is removed, or it would spoil this one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        whole, newline, rest = content.rpartition(b"\n")
        if rest:
            try:
                json.loads(rest)
                file.write(b"\n")
            except ValueError:
                file.truncate(len(whole) + len(newline))
        file.write(json_text(line).encode() + b"\n")
