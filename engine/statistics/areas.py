"""ROC AUC and average precision of one label for many weightings of its images at once, as a bootstrap asks for them.

A label is sorted once. A weighting says how often each group, a patient, counts. Both areas change only where there is
a positive, so what is summed for each weighting are the negatives between neighbouring positives; all else has as many
rows as there are distinct scores of positives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


_NEARLY_NOTHING = 1e-300
"""Added to what was passed at first: where nothing was, the precision is 0, not 0/0; whole numbers stay as they are."""


@dataclass(frozen=True)
class Bags:
    """Groups that are summed together, bag after bag."""

    groups: torch.Tensor  # (m,) int64
    starts: torch.Tensor  # (bags,) int64, where each begins

    def sums(self, weights: torch.Tensor) -> torch.Tensor:
        """(bags, b) float64, from (groups, b) weights in float32 or float64."""
        from torch.nn.functional import embedding_bag

        return embedding_bag(self.groups, weights, self.starts, mode="sum").double()


@dataclass(frozen=True)
class Ranked:
    """A label's images, the most probable first; those of equal scores together."""

    positives: Bags  # one bag for each distinct score of positives: K
    between: Bags  # negatives before each of these scores, and after the last: K + 1
    tied: Bags | None  # negatives of the same score: K; None where no score is shared

    @classmethod
    def of(cls, truth: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> Ranked:
        """From (n,) truths of 0, 1 or NaN for unknown; (n,) scores; (n,) groups, whose weights the images have."""
        known = np.flatnonzero(~np.isnan(truth))
        order = known[np.argsort(-scores[known], kind="stable")]
        positive, group = truth[order] > 0.5, groups[order].astype(np.int64)
        ordered = scores[order]
        level = np.append(0, np.cumsum(ordered[1:] != ordered[:-1]))[: len(order)]  # equal where scores are
        found = np.unique(level[positive])
        bag = np.searchsorted(found, level)
        tied = ~positive & (np.append(found, -1)[bag] == level)
        between = ~positive & ~tied

        def bags(chosen: np.ndarray, count: int) -> Bags:
            import torch

            starts = np.searchsorted(bag[chosen], np.arange(count))
            return Bags(torch.from_numpy(group[chosen]), torch.from_numpy(starts))

        count = len(found)
        return cls(bags(positive, count), bags(between, count + 1), bags(tied, count) if tied.any() else None)

    def areas(self, weights: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(b,) ROC AUC and (b,) average precision; NaN where only positives or only negatives have a weight.

        weights: (groups, b) whole numbers as float32, exact while those of a label add up to less than 2^24, or as
        float64. The AUC is the share of pairs of a positive and a negative whose scores are in order, of equal scores
        one half; the average precision is the sum over thresholds of the gain in recall times the precision (as
        scikit-learn's; not interpolated).
        """
        import torch

        if not len(self.positives.starts):
            nothing = np.full(weights.shape[1], np.nan)
            return nothing, nothing.copy()
        gained, passed = self.positives.sums(weights), self.between.sums(weights)
        half_tied = torch.zeros_like(passed[0])
        if self.tied is not None:
            tied = self.tied.sums(weights)
            passed[:-1] += tied
            half_tied = (gained * tied).sum(0) / 2
        passed[0] += _NEARLY_NOTHING
        passed, found = torch.cumsum(passed, 0), torch.cumsum(gained, 0)
        total_positives, total_negatives = found[-1].clone(), passed[-1].round()
        pairs, passed = total_positives * total_negatives, passed[:-1]
        area = 1 - ((gained * passed).sum(0) - half_tied) / pairs
        average = found.div_(passed.add_(found)).mul_(gained).sum(0) / total_positives
        nowhere = torch.full_like(pairs, torch.nan)
        return tuple(torch.where(pairs > 0, each, nowhere).numpy() for each in (area, average))  # type: ignore[return-value]
