"""`python -m engine.finetune RECIPE from=CHECKPOINT data.train=… data.test=… [shots=N|full] [seed=S]`: transfer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import cli
from engine.comm.communicator import Communicator
from engine.config.loading import to_yaml
from engine.config.schema import AUTO, FinetuneConfig
from engine.saving import signals, watchdog
from engine.whole import may_wait, write_json
from loaders.errors import shorten
from loaders.output import as_command

if TYPE_CHECKING:  # what training needs is imported when it begins: --help and its like answer without torch
    from engine.training.assemble import Parts
    from engine.training.run import Run
    from engine.training.trainer import Hook
    from engine.transfer.plan import Plan

ABOUT = """Fine-tune a pre-trained network on a target, by the BiT-HyperRule, and score it on the whole test set.

  python -m engine.finetune demo from=runs/demo data.train=digits.h5 data.test=null data.holdout=0.2 folder=runs/tuned
  python -m engine.finetune natural from=runs/imagenet21k_r50x1 data.train=train.h5 data.test=test.h5
  python -m engine.finetune xray from=BiT-M-R50x1.npz data.train=… data.test=… shots=10 seed=3
  python -m engine.finetune xray from=runs/a,runs/b,random model=R50x1 … shots=10,100,25%,full seed=0,1,2

The first line goes on from the first try of `python -m engine.pretrain --help`, and runs as it stands.
`from` takes a run folder, a checkpoint folder, our safetensors, the official BiT .npz, the paper's .pth.tar, or
"random" (with model=NAME) for new weights: the baseline of a transfer. One line is appended to `results`.
`from`, `shots` and `seed` take several values, separated by commas: each combination runs, one after another.
The tuned network is kept in `folder`, for engine.predict, evaluate and export; by default beside `results`.
data.val=0.1 holds a share of data.train out to choose by (keep_best=true); folds=5 data.test=null cross-validates."""
SEVERAL = ("from", "shots", "seed")


def finetune(
    config: FinetuneConfig,
    comm: Communicator,
    *,
    quiet: bool = False,
    dry_run: bool = False,
    own_hooks: Sequence[Hook] = (),
) -> dict[str, Any]:
    """Build the parts of the run, train, score, append the result, and return it; `quiet`: without a word.

    UserErrors come together on all ranks. A dry run returns nothing. `own_hooks`: see `Run`. With `folds` and no
    `fold`: see `cross_validate`.
    """
    from engine.training.run import rehearse, train
    from engine.transfer import record

    if config.folds is not None and config.fold is None:
        return cross_validate(config, comm, quiet=quiet, dry_run=dry_run, own_hooks=own_hooks)
    with watchdog.watching(comm, config.comm.timeout_s):
        config = with_micro_batch(config, comm)
        with comm.together():
            run, plan = finetuning(config, comm)
            run = replace(run, own_hooks=tuple(own_hooks))
            if comm.leads and not dry_run:
                record.check_writable(Path(config.results))
        if dry_run:
            rehearse(run, comm)
            return {}
        scores, step = train(run, comm, quiet=quiet), run.times.total_steps
        if config.keep_best and run.folder:
            step = _take_best(run.parts, run.folder / "best", comm)
        scored = replace(run.parts, feed=plan.scored)
        if config.data.val is not None:
            scores = scored.evaluate(comm)
    line = record.result_line(config, plan, scored, run.folder, scores, comm) | {"scored_step": step}
    if comm.leads:
        record.append(Path(config.results), line)
        if run.folder:
            _keep_result(run.folder / "result.json", line)
        if not quiet:
            print(_said(line, scores, config, run.folder), flush=True)
    return line


def with_micro_batch(config: FinetuneConfig, comm: Communicator) -> FinetuneConfig:
    """The configuration with a number in the place of micro_batch=auto."""
    if config.micro_batch != AUTO:
        return config
    from engine.tuning import micro_batch

    with comm.together():
        run, _ = finetuning(config, comm)
    size = micro_batch.settled(run.parts, run.folder, ("micro_batch",), comm)
    return replace(config, accumulate=1, micro_batch=str(size))


def cross_validate(
    config: FinetuneConfig,
    comm: Communicator,
    *,
    quiet: bool = False,
    dry_run: bool = False,
    own_hooks: Sequence[Hook] = (),
) -> dict[str, Any]:
    """Each of `config.folds` runs on the others' images and is scored on its own; the score's mean and sample standard
    deviation over them, in percent, and the results of the runs."""
    from statistics import mean, stdev

    lines = []
    for fold in range(config.folds or 0):
        own = config.folder if config.folder in (None, AUTO) else f"{config.folder}/fold-{fold}"
        chosen = replace(config, fold=fold, folder=own)
        lines.append(finetune(chosen, comm, quiet=quiet, dry_run=dry_run, own_hooks=own_hooks))
    if dry_run:
        return {}
    scores = [line["metric_value"] for line in lines]
    found = {"metric": lines[0]["metric"], "mean": mean(scores), "spread": stdev(scores), "folds": lines}
    if comm.leads and not quiet:
        each = ", ".join(f"{score:.2f}" for score in scores)
        name = found["metric"].replace("_", " ")
        print(f"{len(lines)} folds: {name} {found['mean']:.2f} ± {found['spread']:.2f}% ({each})", flush=True)
    return found


def _said(line: dict[str, Any], scores: dict[str, float], config: FinetuneConfig, folder: Path | None) -> str:
    """What came of a run, for people; an accuracy beside that of who always says the most frequent class."""
    from engine.training.hooks import describe

    said = [f"{describe(scores)} → {config.results}"]
    if line["majority"] is not None:
        said.append(f"always saying the most frequent class of the test set: top-1 {line['majority']:.2f}%")
    if line["never_predicted"]:
        said.append(f"never predicted, though the test set has them: {shorten(line['never_predicted'])}")
    said.append(f"the tuned network is in {folder}" if folder else "the tuned network is not kept, since folder=null")
    return "\n".join(said)


def _keep_result(file: Path, line: dict[str, Any]) -> None:
    with may_wait(file, "the line of results has all of it"):
        write_json(file, line)


def _take_best(parts: Parts, folder: Path, comm: Communicator) -> int:
    """Give all ranks the weights of the best checkpoint; its step."""
    from engine.network import weights
    from engine.saving import checkpoint

    with comm.together():
        best = checkpoint.load(checkpoint.find(folder))
        weights.apply(parts.model, best.weights, new_head=False)
    parts.broadcast(comm)
    return best.state["step"]


def finetuning(config: FinetuneConfig, comm: Communicator) -> tuple[Run, Plan]:
    """The run that a configuration describes, and what it transfers."""
    from engine.training.precision import bad_steps
    from engine.training.run import Run
    from engine.transfer import plan as transfer
    from engine.transfer import record

    parts, plan = transfer.finetuning(config, comm)
    # A folder's checkpoint is gone on from by the same run only, not by another seed or target of the same classes.
    parts = replace(parts, about=parts.about | {"settings": record.fingerprint(config)}, each_class=True)
    run = Run(
        parts=parts,
        times=plan.times,
        title=plan.title,
        folder=record.run_folder(config, plan, parts),
        config=to_yaml(config),
        resume=config.resume,
        log_every=config.log_every,
        eval_every=config.eval_every or plan.times.total_steps,
        async_save=config.async_save,
        tracking=config.tracking,
        keep_best=config.keep_best,
        keep=1,
        save_every=(float(config.checkpoint_every),) if config.checkpoint_every else (),
        comm=config.comm,
        graph=config.graph,
        bad_steps=bad_steps(config.bad_steps, config.precision),
        mix=plan.mix,
        intro=plan.describe(),
    )
    return run, plan


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    signals.listen()
    parser = cli.parser("finetune", FinetuneConfig, ABOUT)
    arguments = parser.parse_intermixed_args(argv)
    if cli.answered(parser, FinetuneConfig, "finetune", arguments, SEVERAL):
        return
    body = partial(finetune, dry_run=arguments.dry_run)
    cli.start(FinetuneConfig, "finetune", arguments.recipe, arguments.settings, body, SEVERAL)


if __name__ == "__main__":
    as_command(main)
