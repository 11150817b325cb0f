"""Sheets of images as runs were given them: augmented, with their labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.config.loading import load
from engine.config.schema import FinetuneConfig, PretrainConfig
from engine.page.document import Section, Sheet
from engine.page.runs import CONFIG, Run
from engine.training import assemble
from engine.transfer import hyperrule, plan
from loaders.errors import UserError, in_words
from loaders.packs.shard import Pack
from loaders.pipelines.sheet import contact_sheet
from loaders.pipelines.transform import Transform

SAMPLES, COLUMNS = 16, 8
SIDE = 104
"""Of a sample on the page, pixels: ten runs' sheets make less than half of a page of 1 MB."""


def of_inputs(runs: Sequence[Run]) -> list[Section]:
    """A sheet for each run whose pack is still there; what is in the way of the others."""
    sheets, missing = [], []
    for run in runs:
        try:
            sheets.append(_sheet(run))
        except (UserError, OSError) as error:
            missing.append(f"{run.name}: {in_words(error)}")
    about = f"The first {SAMPLES} samples of a run's seed, as the network was given them, with label and key."
    return [Section("Inputs", " ".join([about, *(f"Not shown: {said}." for said in missing)]), sheets=sheets)]


def _sheet(run: Run) -> Sheet:
    pack, transform, seed = _inputs(run)
    return Sheet(
        run.name,
        contact_sheet(pack, transform, count=SAMPLES, columns=COLUMNS, seed=seed, backend="host", side=SIDE),
    )


def _inputs(run: Run) -> tuple[Pack, Transform, int]:
    """The pack, the training transform and the seed of a run."""
    recipe = str(run.folder / CONFIG)
    if "from" not in run.config:
        config = load(PretrainConfig, recipe, [], "pretrain")
        return Pack.open(config.data.train), assemble.transforms(config.data)[0], config.train.seed
    tuned = load(FinetuneConfig, recipe, [], "finetune")
    pack = Pack.open(tuned.data.train)
    height, width = np.median(pack.sizes, axis=0).astype(int)
    transform, _ = plan.transforms(tuned, hyperrule.rule(len(pack), int(height), int(width)), {})
    return pack, transform, tuned.seed
