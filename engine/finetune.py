"""`python -m engine.finetune RECIPE from=CHECKPOINT data.train=… data.test=… [shots=N|full] [seed=S]`: transfer."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from engine import cli
from engine.comm.communicator import Communicator
from engine.config.loading import to_yaml, variants
from engine.config.schema import FinetuneConfig
from engine.training import assemble, hooks, metrics
from engine.training.trainer import Trainer
from engine.transfer import plan as transfer
from loaders.errors import UserError

ABOUT = """Fine-tune a pre-trained network on a target, by the BiT-HyperRule, and score it on the whole test set.

  python -m engine.finetune natural from=runs/imagenet21k_r50x1 data.train=train.h5 data.test=test.h5
  python -m engine.finetune xray from=BiT-M-R50x1.npz data.train=… data.test=… shots=10 seed=3
  python -m engine.finetune xray from=runs/a,runs/b,random model=R50x1 … shots=10,100,full seed=0,1,2

`from` takes a run folder, a checkpoint folder, our safetensors, the official BiT .npz, the paper's .pth.tar, or
"random" (with model=NAME) for new weights: the baseline of a transfer. One line is appended to `results`.
`from`, `shots` and `seed` take several values, separated by commas: each combination runs, one after another."""
SEVERAL = ("from", "shots", "seed")


def finetune(config: FinetuneConfig, comm: Communicator, *, quiet: bool = False) -> dict:
    """Build the parts of the run, train, score, append the result, and return it; `quiet`: without a word.

    UserErrors come together on all ranks.
    """
    speaks = comm.leads and not quiet
    with comm.together():
        parts, plan = transfer.finetuning(config, comm)
        if comm.leads:
            check_writable(Path(config.results))
    folder = Path(config.folder) if config.folder else None
    log = metrics.MetricLog(folder) if folder and comm.leads else None
    progress = hooks.Progress(0, plan.times.total_steps, config.batch, speaks)
    scores = hooks.Evaluate(lambda: parts.evaluate(comm), plan.times.total_steps, progress, log, plan.title)
    found: list = [hooks.Log(config.log_every, progress, log, plan.times.steps_per_epoch), scores]
    if folder:
        found.append(hooks.SaveCheckpoints(folder / "checkpoints", parts.about, 1, plan.times.total_steps, None))
    trainer = Trainer(
        model=parts.model,
        flat=parts.flat,
        optimizer=parts.optimizer,
        batches=parts.feed.train_batches(0, plan.times.total_steps),
        objective=parts.objective,
        learning_rate=plan.times.learning_rate,
        comm=comm,
        precision=parts.precision,
        total_steps=plan.times.total_steps,
        global_batch=config.batch,
        slice_bytes=int(config.comm.slice_mib * 2**20),
        mix=plan.mix,
        hooks=found,
    )
    parts.broadcast(comm)
    if speaks:
        print(parts.summary(comm), plan.describe(), sep="\n", flush=True)
    trainer.fit()
    line = result_line(config, plan, parts, scores.newest, comm)
    if comm.leads:
        if folder:
            (folder / "config.yaml").write_text(to_yaml(config))
        append(Path(config.results), line)
    if speaks:
        print(f"{hooks.describe(scores.newest)} → {config.results}", flush=True)
    return line


def result_line(
    config: FinetuneConfig, plan: transfer.Plan, parts: assemble.Parts, scores: dict[str, float], comm: Communicator
) -> dict:
    """One result with the columns of the published results, and what else identifies the run."""
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
    for key in ("about", "folder", "results", "device", "log_every", "comm"):
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
        file.write(json.dumps(line).encode() + b"\n")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser("finetune", FinetuneConfig, ABOUT)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.list:
        cli.list_recipes("finetune")
        return
    if arguments.recipe is None:
        parser.error("which recipe? --list shows those that come with the engine")
    if arguments.print_config:
        for chosen in variants(arguments.settings, SEVERAL):
            cli.guard(partial(cli.print_config, FinetuneConfig, arguments.recipe, chosen, "finetune"))
        return
    cli.start(FinetuneConfig, "finetune", arguments.recipe, arguments.settings, finetune, SEVERAL)


if __name__ == "__main__":
    main()
