"""Whether what was exported answers as the network does, on real images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.exporting.deployed import Deployed
from engine.predicting.tuned import Tuned
from loaders.errors import UserError
from loaders.packs.shard import Pack
from loaders.pipelines.batches import eval_batches
from loaders.pipelines.order import EvalPlan

MOST = 1e-5
"""How far an answer may be off: probabilities, and logits as a share of the largest, or of 1."""
ROUNDED = 4
"""How many times farther than its own rounding in float32 takes it, where a network is so sensitive that this is more:
another order of sums is as far off."""
_BATCH = 8
_KEYS = ("test", "val", "train")  # of a run's data, the first that is there


@dataclass(frozen=True)
class Distance:
    """The largest difference over all images and classes."""

    probabilities: float
    logits: float

    def within(self, other: Distance, times: float = 1) -> bool:
        """Whether both are at most so many times those of another; false for NaN."""
        return self.probabilities <= times * other.probabilities and self.logits <= times * other.logits


ALLOWED = Distance(MOST, MOST)


class Reals:
    """Some images of a pack, as an exported network takes them, and what the network itself says of them.

    pack: None: one that the run was scored or trained on, as its configuration names it.
    """

    def __init__(self, tuned: Tuned, deployed: Deployed, pack: str | None, count: int) -> None:
        self.pack = _opened(tuned, pack)
        if not len(self.pack):
            raise UserError(f"{self.pack.path} holds no images to compare with; name another with --images")
        chosen = np.unique(np.linspace(0, len(self.pack) - 1, min(count, len(self.pack))).astype(np.int64))
        self.count = len(chosen)
        plan = EvalPlan(pool=chosen, batch=min(_BATCH, len(chosen)))
        raw = replace(tuned.transform, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        self.images, said = [], []
        how: dict[str, Any] = {"backend": "host", "threads": 2}
        with torch.no_grad():
            for seen, plain in zip(
                eval_batches(self.pack, plan, tuned.transform, **how),
                eval_batches(self.pack, plan, raw, **how),
                strict=True,
            ):
                self.images.append(plain.images[plain.valid])
                said.append(tuned.network(seen.images[seen.valid]))
            self._said = [deployed.answer(logits) for logits in said]

    def distance(self, runs: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Distance:
        """How far an exported network is off. All images but one go in batches, that one alone."""
        apart = [0.0, 0.0]
        for images, expected in self._pieces():
            scale = [1.0, max(1.0, float(expected[1].abs().max()))]
            for i, (found, wanted) in enumerate(zip(runs(images), expected, strict=True)):
                apart[i] = float(np.maximum(apart[i], float((found - wanted).abs().max()) / scale[i]))  # NaN stays
        return Distance(*apart)

    def rounding(self, deployed: Deployed) -> Distance:
        """How far the network's own answers in float32 are from those in float64."""
        exact = copy.deepcopy(deployed).double()
        return self.distance(lambda images: exact(images.double()))

    def _pieces(self) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        yield self.images[0][:1], (self._said[0][0][:1], self._said[0][1][:1])
        yield from zip(self.images, self._said, strict=True)


def _opened(tuned: Tuned, named: str | None) -> Pack:
    if named is not None:
        return Pack.open(named)
    data: dict[str, Any] = tuned.config.get("data", {})
    places = next((data[key] for key in _KEYS if data.get(key)), None)
    if places is None:
        raise UserError(f"{tuned.path} does not say which images it was trained on; name a pack with --images")
    try:
        return Pack.open(places)
    except UserError as error:
        where = "" if Path(str(places)).is_absolute() else f", seen from {Path.cwd()}"
        raise UserError(
            f"the images that the run was scored on are not there to compare with ({error}{where}); name a pack with "
            "--images"
        ) from error
