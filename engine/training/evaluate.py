"""Scores of a network on a whole test set, over all ranks: loss, top-1 accuracy, mean ROC AUC."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import nn

from engine.comm.communicator import Communicator, SharedError
from engine.saving import watchdog
from engine.training.objective import Objective
from engine.training.precision import Precision
from loaders.pipelines.batches import Batch

OF_CLASS = "class/"  # what the names of single classes' scores start with
NEVER = "never/"  # and those of classes that no image was said to be of


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
    class_names: Sequence[str] = (),
) -> dict[str, float]:
    """Scores in percent, each sample counted once however many ranks share the work.

    batches: this rank's share, the same number of batches on all ranks, with `valid` false on padding.
    Returns loss, images, and top1 for one label per image, or mean_auc for a vector of labels (unknown: NaN) with
    auc_classes, the number of labels it is the mean of: a label without both a positive and a negative has no AUC.
    `mean_auc` asks for it of single labels too: of each class against the others, by its softmax probability.
    With `class_names` also `low` and `high`, a 95% interval of the score (mean_auc where there is one, else top1) over
    the images, and `class/NAME`: the share of a class's images that were found, or its AUC; of one label per image also
    `never/NAME`: how many images a class has that no image was said to be of.
    Where batches are the same, the scores are, to the bit, whichever rank had which.
    SharedError where the loss is no finite number.
    """
    model.eval()
    parts: list[torch.Tensor] = []
    rows: list[np.ndarray] = []
    for number, batch in enumerate(batches):
        watchdog.passed(f"evaluation: batch {number}", slow=True)
        with precision.autocast():
            logits = model(batch.images).float()
        kept, labels = logits[batch.valid], batch.labels[batch.valid]
        total, count = objective.loss(kept, labels)
        single = labels.ndim == 1
        hits = (kept.argmax(1) == labels).sum() if single else torch.zeros_like(total)
        part = torch.stack([value.double() for value in (total, torch.as_tensor(count, device=total.device), hits)])
        parts.append(torch.cat([part, batch.valid.sum().double().reshape(1).to(part.device)]))
        if mean_auc or not single:
            rows.append(_rows(logits, batch))
        elif class_names:
            rows.append(torch.stack([batch.labels, logits.argmax(1), batch.valid.long()], 1).cpu().numpy())
    model.train()
    watchdog.passed("evaluation: scores of all ranks", slow=True)
    if not parts:
        raise AssertionError("an evaluation plan gives each rank at least one batch")
    sums = comm.gather(torch.stack(parts).cpu().numpy(), "evaluate")  # (batches of all ranks, 4) float64
    if not np.isfinite(sums[:, 0]).all():  # of all ranks, so that all stop
        raise SharedError(
            f"the loss on the test set is {sums[:, 0].sum()}: training has diverged, and there is nothing to score. "
            "Lower the learning rate (optim.base_lr; lr in fine-tuning), or train in bf16 or fp32"
        )
    loss, known, found, images = (math.fsum(column) for column in sums.T)  # exact, in any order
    result = {"loss": loss / (known or 1.0), "images": images}
    if single:
        result["top1"] = 100.0 * found / images
    if not rows:
        return result
    gathered = comm.gather(np.stack(rows), "evaluate.scores")  # (ranks * batches, samples, …)
    each = gathered.reshape(comm.size, len(rows), *gathered.shape[1:])
    gathered = each.swapaxes(0, 1).reshape(-1, gathered.shape[-1])  # as in the pool: batches went round the ranks
    gathered = gathered[gathered[:, -1] > 0]
    result |= (_mean_auc if mean_auc or not single else _found)(gathered, class_names)
    return result | (_never(gathered, class_names) if single else {})


def _rows(logits: torch.Tensor, batch: Batch) -> np.ndarray:
    """Scores, labels as a vector, and whether the sample counts: (b, 2 L + 1) float32."""
    labels = batch.labels
    if labels.ndim == 1:
        logits, labels = logits.softmax(1), nn.functional.one_hot(labels, logits.shape[1])
    return torch.cat([logits, labels.float(), batch.valid[:, None].float()], 1).cpu().numpy()


def _mean_auc(rows: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    width = (rows.shape[1] - 1) // 2
    scores, labels = rows[:, :width], rows[:, width : 2 * width]
    areas = per_class_auc(labels, scores)
    known = areas[~np.isnan(areas)]
    result = {"mean_auc": 100.0 * float(known.mean()) if len(known) else float("nan"), "auc_classes": len(known)}
    if not names:
        return result
    from engine.statistics import intervals  # what scores need is not read at the start

    return result | _each(names, areas, intervals.of_mean_auc(labels, scores))


def _found(rows: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Of classes, numbers that are there and were said, (N, 3) int64."""
    labels, hits = rows[:, 0], rows[:, 0] == rows[:, 1]
    counts = np.bincount(labels, minlength=len(names))
    found = np.bincount(labels, weights=hits, minlength=len(names))
    shares = np.divide(found, counts, out=np.full(len(counts), np.nan), where=counts > 0)
    from engine.statistics import intervals

    return _each(names, shares, intervals.of_share(int(hits.sum()), len(hits)))


def _never(rows: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Of rows as either of the two above has them."""
    labels, said = rows[:, 0], rows[:, 1]
    if rows.shape[1] > 3:
        width = (rows.shape[1] - 1) // 2
        labels, said = rows[:, width : 2 * width].argmax(1), rows[:, :width].argmax(1)
    there, found = (np.bincount(each.astype(np.int64), minlength=len(names)) for each in (labels, said))
    return {f"{NEVER}{name}": float(n) for name, n, k in zip(names, there, found, strict=False) if n and not k}


def _each(names: Sequence[str], shares: np.ndarray, interval: tuple[float, float]) -> dict[str, float]:
    low, high = interval
    each = {f"{OF_CLASS}{name}": 100.0 * share for name, share in zip(names, shares.tolist(), strict=False)}
    return {"low": low, "high": high} | each


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


def majority(labels: np.ndarray) -> float | None:
    """Top-1 in percent of who always says the most frequent class; labels (n,) of classes. None for label vectors."""
    if labels.ndim != 1 or not len(labels):
        return None
    return 100 * float(np.unique(labels, return_counts=True)[1].max()) / len(labels)
