"""How far a score could be off for the test images that were taken: percentile intervals of the bootstrap over them."""

from __future__ import annotations

import numpy as np

from engine.statistics.areas import Ranked
from engine.statistics.bootstrap import LEVELS, interval
from engine.statistics.scores import nan_mean

_RESAMPLES, _AT_ONCE = 400, 50


def of_share(hits: int, images: int) -> tuple[float, float]:
    """95% interval, in percent, of `hits` of `images`: a resampled share is binomial, so nothing has to be drawn."""
    from scipy.stats import binom  # hundreds of files: opened when there is something to score

    low, high = binom.ppf(LEVELS, images, hits / images)
    return 100.0 * float(low) / images, 100.0 * float(high) / images


def of_mean_auc(labels: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """95% interval, in percent, of the mean over classes of the ROC AUC, over 400 resamples of the images.

    labels (n, L) of 0, 1, or NaN for unknown; scores (n, L). A resample is scored over the classes that have both
    values in it; NaN where none has.
    """
    import torch

    random = np.random.RandomState(0)
    ranked = [Ranked.of(labels[:, k], scores[:, k], np.arange(len(labels))) for k in range(labels.shape[1])]
    means = []
    for _ in range(_RESAMPLES // _AT_ONCE):
        times = random.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), _AT_ONCE)
        weights = torch.from_numpy(np.ascontiguousarray(times.T, np.float32))
        means.append(nan_mean(np.stack([one.areas(weights)[0] for one in ranked])))
    low, high, _ = interval(np.concatenate(means))
    return 100.0 * low, 100.0 * high
