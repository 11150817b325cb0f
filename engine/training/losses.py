"""Losses as (sum, count) pairs, and MixUp.

A mean over micro-batches and ranks is exact only as the quotient of two sums, so every loss here gives both.
Losses are computed in fp32 at least, whatever the logits' dtype.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(
    logits: Tensor, labels: Tensor, valid: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropy of softmax(logits), in nats.

    `logits` (n, c); `labels` (n,) int64 classes or (n, c) probabilities, as `mixup` makes them; `valid` (n,)
    bool, False for samples that do not count; `weights` (c,) of the classes. Returns the sum of the samples'
    losses and their number, or the sum of their weights, 0-D, fp32 or wider.
    """
    logits = _wide(logits)
    if labels.is_floating_point():
        labels = labels.to(logits.dtype)
    losses = F.cross_entropy(logits, labels, weights, reduction="none")
    if weights is None:
        counted = torch.ones_like(losses)
    else:
        counted = labels @ weights.to(losses.dtype) if labels.is_floating_point() else weights[labels]
    if valid is not None:
        losses, counted = torch.where(valid, losses, 0), torch.where(valid, counted, 0)
    return losses.sum(), counted.sum().to(losses.dtype)


def masked_bce(
    logits: Tensor, labels: Tensor, valid: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Binary cross entropy of one sigmoid per label, in nats, over the labels that are known.

    `logits` (n, l); `labels` (n, l) float in [0, 1], NaN for unknown, or (n, l, 2): how much of each is known
    to be 0, and how much 1, as `mixup` makes them; `valid` (n,) bool, False for samples that do not count;
    `weights` (l, 2) of 0 and 1 of each label. Returns the sum over known labels and how many are known, or the
    sum of their weights, 0-D, fp32 or wider; both are 0, and so is every gradient, if none is known.
    """
    logits = _wide(logits)
    shares = (_known(labels) if labels.ndim == 2 else labels).to(logits.dtype)
    negative, positive = (shares if weights is None else shares * weights).unbind(-1)
    known = negative + positive
    if valid is not None:
        known = known * valid[:, None]
    targets = torch.where(known > 0, positive / known, 0)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return torch.where(known > 0, known * losses, 0).sum(), known.sum()


def mixup(
    images: Tensor, labels: Tensor, others: Tensor, of_others: Tensor, lam: float, num_classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """`lam` of each sample and `1 - lam` of its partner (arXiv 1710.09412).

    `images` and `others`, the partners' (n, ...) float; `labels` and `of_others` (n,) int64, for which
    `num_classes` is needed, or (n, k) float, NaN for unknown; `lam` in [0, 1], see `mixup_share`. Returns new
    images and (n, c) probabilities, or (n, k, 2) for `masked_bce`: its loss of them is the mixture of both losses,
    so a label that is unknown on one side counts by the other alone.
    """
    if labels.is_floating_point():
        labels, of_others = _known(labels), _known(of_others)
    else:
        labels, of_others = (F.one_hot(each, num_classes or -1).to(torch.float32) for each in (labels, of_others))
    return torch.lerp(others, images, lam), torch.lerp(of_others, labels, lam)


def mixup_share(alpha: float, uniform: float) -> float:
    """A draw of MixUp's Beta(alpha, alpha) from a `uniform` one in [0, 1), by the inverse distribution
    function.

    1, that is no mixing, for `alpha` 0.
    """
    if alpha == 0:
        return 1.0
    from scipy.special import betaincinv  # hundreds of files, which ranks that mix nothing need not open

    return float(betaincinv(alpha, alpha, uniform))


def _known(labels: Tensor) -> Tensor:
    """(n, l) in [0, 1], NaN for unknown → (n, l, 2): how much of each label is 0, and how much 1."""
    both = torch.stack([1 - labels, labels], -1)
    return torch.where(torch.isnan(both), 0, both)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
