"""Scores of a network on a whole test set, over all ranks: loss, top-1 accuracy, mean ROC AUC."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import nn

from engine.comm.communicator import Communicator, SharedError
from engine.training.objective import Objective
from engine.training.precision import Precision
from loaders.pipelines.batches import Batch


# Not in inference mode: a thread of Horovod's, which is not in it, writes into the scores of all ranks.
@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    objective: Objective,
    comm: Communicator,
    precision: Precision,
    *,
    mean_auc: bool = False,
) -> dict[str, float]:
    """Scores in percent, each sample counted once however many ranks share the work.

    batches: this rank's share, the same number of batches on all ranks, with `valid` false on padding.
    Returns loss, images, and top1 for one label per image, or mean_auc for a vector of labels (unknown: NaN) with
    auc_classes, the number of labels it is the mean of: a label without both a positive and a negative has no AUC.
    `mean_auc` asks for it of single labels too: of each class against the others, by its softmax probability.
    SharedError where the loss is no finite number.
    """
    model.eval()
    sums: torch.Tensor | None = None
    rows: list[np.ndarray] = []
    for batch in batches:
        with precision.autocast():
            logits = model(batch.images).float()
        kept, labels = logits[batch.valid], batch.labels[batch.valid]
        total, count = objective.loss(kept, labels)
        single = labels.ndim == 1
        hits = (kept.argmax(1) == labels).sum() if single else torch.zeros_like(total)
        part = torch.stack([value.double() for value in (total, torch.as_tensor(count, device=total.device), hits)])
        part = torch.cat([part, batch.valid.sum().double().reshape(1).to(part.device)])
        sums = part if sums is None else sums + part
        if mean_auc or not single:
            rows.append(_rows(logits, batch))
    model.train()
    if sums is None:
        raise AssertionError("an evaluation plan gives each rank at least one batch")
    total, count, hits, images = comm.sum_(sums.cpu(), "evaluate").tolist()
    if not math.isfinite(total):  # of all ranks, so that all stop
        raise SharedError(
            f"the loss on the test set is {total}: training has diverged, and there is nothing to score. Lower the "
            "learning rate (optim.base_lr; lr in fine-tuning), or train in bf16 or fp32"
        )
    result = {"loss": total / max(count, 1.0), "images": images}
    if single:
        result["top1"] = 100.0 * hits / images
    return result | (_mean_auc(comm.gather(np.concatenate(rows), "evaluate.scores")) if rows else {})


def _rows(logits: torch.Tensor, batch: Batch) -> np.ndarray:
    """Scores, labels as a vector, and whether the sample counts: (b, 2 L + 1) float32."""
    labels = batch.labels
    if labels.ndim == 1:
        logits, labels = logits.softmax(1), nn.functional.one_hot(labels, logits.shape[1])
    return torch.cat([logits, labels.float(), batch.valid[:, None].float()], 1).cpu().numpy()


def _mean_auc(rows: np.ndarray) -> dict[str, float]:
    rows = rows[rows[:, -1] > 0]
    width = (rows.shape[1] - 1) // 2
    areas = per_class_auc(rows[:, width : 2 * width], rows[:, :width])
    known = areas[~np.isnan(areas)]
    return {"mean_auc": 100.0 * float(known.mean()) if len(known) else float("nan"), "auc_classes": len(known)}


def per_class_auc(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """ROC AUC of each class, (L,) in 0..1; NaN where the known labels hold only one value.

    labels: (N, L) of 0, 1, or NaN for unknown; scores: (N, L), any increasing function of the probability.
    """
    from sklearn.metrics import roc_auc_score  # hundreds of files: opened when there is something to score

    areas = np.full(labels.shape[1], np.nan)
    for index in range(labels.shape[1]):
        known = ~np.isnan(labels[:, index])
        truth = labels[known, index] > 0.5
        if truth.any() and not truth.all():
            areas[index] = roc_auc_score(truth, scores[known, index])
    return areas


def without_auc(labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """The labels of a test set that have no AUC, since all known ones have one value: they are not in the mean.

    labels: (N,) int64 classes, or (N, L) of 0, 1, or NaN for unknown; names: of the L classes or labels.
    """
    if labels.ndim == 1:
        counts = np.bincount(labels, minlength=len(names))
        return [name for name, count in zip(names, counts, strict=True) if count in (0, len(labels))]
    both = np.logical_and((labels > 0.5).any(0), (labels <= 0.5).any(0))  # comparisons with NaN are false
    return [name for name, has in zip(names, both.tolist(), strict=True) if not has]
