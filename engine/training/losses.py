"""Losses as (sum, count) pairs, and MixUp.

A mean over micro-batches and ranks is exact only as the quotient of two sums, so every loss here gives both.
Losses are computed in fp32 at least, whatever the logits' dtype.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, labels: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross entropy of softmax(logits), in nats.

    `logits` (n, c); `labels` (n,) int64 classes or (n, c) probabilities, as `mixup` makes them; `valid` (n,)
    bool, False for samples that do not count. Returns the sum of the samples' losses and their number, 0-D,
    fp32 or wider.
    """
    logits = _wide(logits)
    if labels.is_floating_point():
        labels = labels.to(logits.dtype)
    losses = F.cross_entropy(logits, labels, reduction="none")
    if valid is None:
        return losses.sum(), losses.new_tensor(float(len(losses)))
    return torch.where(valid, losses, 0).sum(), valid.sum().to(losses.dtype)


def masked_bce(logits: Tensor, labels: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Binary cross entropy of one sigmoid per label, in nats, over the labels that are known.

    `logits` (n, l); `labels` (n, l) float in [0, 1], NaN for unknown; `valid` (n,) bool, False for samples
    that do not count. Returns the sum over known labels and their number, 0-D, fp32 or wider; both are 0, and
    so is every gradient, if none is known.
    """
    logits = _wide(logits)
    known = ~torch.isnan(labels)
    if valid is not None:
        known = known & valid[:, None]
    targets = torch.where(known, labels, 0).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return torch.where(known, losses, 0).sum(), known.sum().to(losses.dtype)


def mixup(
    images: Tensor, labels: Tensor, lam: float, permutation: Tensor, num_classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """`lam` of each sample and `1 - lam` of the one that `permutation` puts beside it (arXiv 1710.09412).

    `images` (n, ...) float; `labels` (n,) int64, for which `num_classes` is needed, or (n, k) float, of which
    an unknown one (NaN) makes the mixed one unknown; `lam` in [0, 1], see `mixup_share`; `permutation` (n,)
    int64. Returns new images and (n, c) float labels.
    """
    if not labels.is_floating_point():
        labels = F.one_hot(labels, -1 if num_classes is None else num_classes).to(torch.float32)
    return lam * images + (1 - lam) * images[permutation], lam * labels + (1 - lam) * labels[permutation]


def mixup_share(alpha: float, uniform: float) -> float:
    """A draw of MixUp's Beta(alpha, alpha) from a `uniform` one in [0, 1), by the inverse distribution
    function.

    1, that is no mixing, for `alpha` 0.
    """
    if alpha == 0:
        return 1.0
    from scipy.special import betaincinv  # hundreds of files, which ranks that mix nothing need not open

    return float(betaincinv(alpha, alpha, uniform))


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
