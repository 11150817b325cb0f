"""`python -m engine.finetune RECIPE from=CHECKPOINT data.train=… data.test=… [shots=N|full] [seed=S]`: transfer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import cli
from engine.comm.communicator import Communicator
from engine.config.loading import to_yaml
from engine.config.schema import FinetuneConfig

if TYPE_CHECKING:  # what training needs is imported when it begins: --help and its like answer without torch
    from engine.training.run import Run
    from engine.transfer.plan import Plan

ABOUT = """Fine-tune a pre-trained network on a target, by the BiT-HyperRule, and score it on the whole test set.

  python -m engine.finetune natural from=runs/imagenet21k_r50x1 data.train=train.h5 data.test=test.h5
  python -m engine.finetune xray from=BiT-M-R50x1.npz data.train=… data.test=… shots=10 seed=3
  python -m engine.finetune xray from=runs/a,runs/b,random model=R50x1 … shots=10,100,full seed=0,1,2

`from` takes a run folder, a checkpoint folder, our safetensors, the official BiT .npz, the paper's .pth.tar, or
"random" (with model=NAME) for new weights: the baseline of a transfer. One line is appended to `results`.
`from`, `shots` and `seed` take several values, separated by commas: each combination runs, one after another."""
SEVERAL = ("from", "shots", "seed")


def finetune(
    config: FinetuneConfig, comm: Communicator, *, quiet: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Build the parts of the run, train, score, append the result, and return it; `quiet`: without a word.

    UserErrors come together on all ranks. A dry run returns nothing.
    """
    from engine.training.hooks import describe
    from engine.training.run import rehearse, train
    from engine.transfer import record

    with comm.together():
        run, plan = finetuning(config, comm)
        if comm.leads and not dry_run:
            record.check_writable(Path(config.results))
    if dry_run:
        rehearse(run, comm)
        return {}
    scores = train(run, comm, quiet=quiet)
    line = record.result_line(config, plan, run.parts, scores, comm)
    if comm.leads:
        record.append(Path(config.results), line)
        if not quiet:
            print(f"{describe(scores)} → {config.results}", flush=True)
    return line


def finetuning(config: FinetuneConfig, comm: Communicator) -> tuple[Run, Plan]:
    """The run that a configuration describes, and what it transfers."""
    from engine.training.run import Run
    from engine.transfer import plan as transfer
    from engine.transfer import record

    parts, plan = transfer.finetuning(config, comm)
    # A folder's checkpoint is gone on from by the same run only, not by another seed or target of the same classes.
    parts = replace(parts, about=parts.about | {"settings": record.fingerprint(config)})
    run = Run(
        parts=parts,
        times=plan.times,
        title=plan.title,
        folder=Path(config.folder) if config.folder else None,
        config=to_yaml(config),
        resume=config.resume,
        log_every=config.log_every,
        eval_every=plan.times.total_steps,
        keep=1,
        save_every=(float(config.checkpoint_every),) if config.checkpoint_every else (),
        slice_bytes=int(config.comm.slice_mib * 2**20),
        mix=plan.mix,
        intro=plan.describe(),
    )
    return run, plan


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser("finetune", FinetuneConfig, ABOUT)
    arguments = parser.parse_intermixed_args(argv)
    if cli.answered(parser, FinetuneConfig, "finetune", arguments, SEVERAL):
        return
    body = partial(finetune, dry_run=arguments.dry_run)
    cli.start(FinetuneConfig, "finetune", arguments.recipe, arguments.settings, body, SEVERAL)


if __name__ == "__main__":
    main()
