"""What is minimised: chosen by the kind of labels that a pack holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from engine.training import losses

Loss = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Objective:
    """A loss as a sum over labels and their number, so that the mean over ranks and micro-batches is exact."""

    name: str
    loss: Loss  # (logits (n, L), labels) → sum of losses, number of labels in the sum
    labels_per_image: int
    masked: bool  # whether labels may be unknown, or have weights, so that their number varies


def choose(
    labels: np.ndarray, balanced: bool = False, num_classes: int = 0, device: torch.device | None = None
) -> Objective:
    """Softmax cross entropy for one class per image, (N,); masked binary cross entropy for label vectors, (N, L).

    `balanced`: by weights against the frequency of the training `labels`, on `device`, of each of `num_classes` or, in
    vectors, of 0 and 1 of each label; then the mean is one over weights.
    """
    weights = class_weights(labels, num_classes).to(device) if balanced else None
    if labels.ndim == 1:
        loss = losses.cross_entropy if weights is None else partial(losses.cross_entropy, weights=weights)
        return Objective("cross entropy", loss, 1, masked=balanced)
    loss = losses.masked_bce if weights is None else partial(losses.masked_bce, weights=weights)
    return Objective("binary cross entropy", loss, labels.shape[1], masked=True)


def class_weights(labels: np.ndarray, num_classes: int) -> torch.Tensor:
    """n / (k n_c), of n labels in k classes n_c of class c, as scikit-learn's "balanced"; 0 where there are none.

    labels (N,) int64 → (num_classes,) float32; (N, L) of 0, 1, NaN for unknown → (L, 2) for 0 and 1.
    """
    if labels.ndim == 1:
        counts = np.bincount(labels, minlength=num_classes).astype(np.float64)
    else:
        counts = np.stack([(labels <= 0.5).sum(0), (labels > 0.5).sum(0)], axis=1).astype(np.float64)
    there = (counts > 0).sum(-1, keepdims=True)
    found = np.divide(counts.sum(-1, keepdims=True), there * counts, out=np.zeros_like(counts), where=counts > 0)
    return torch.from_numpy(found.astype(np.float32))
