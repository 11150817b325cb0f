"""What is minimised: chosen by the kind of labels that a pack holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    masked: bool  # whether labels may be unknown, so that their number varies


def choose(labels: np.ndarray) -> Objective:
    """Softmax cross entropy for one class per image, (N,); masked binary cross entropy for label vectors, (N, L)."""
    if labels.ndim == 1:
        return Objective("cross entropy", losses.cross_entropy, 1, masked=False)
    return Objective("binary cross entropy", losses.masked_bce, labels.shape[1], masked=True)
