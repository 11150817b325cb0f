"""Made-up predictions, with labels that they have to do with."""

import numpy as np
from scipy.special import expit

from engine.predicting.table import Predictions

NAMES = ("edema", "effusion", "hernia")


def labels(seed, n=300, skill=1.5, sure=1.0, truth_of=0, many_images=True):
    """Predictions of three labels, the last one rare; the labels are the same for the same `truth_of`."""
    rng = np.random.default_rng(truth_of)
    truth = (rng.random((n, 3)) < (0.4, 0.2, 0.03)).astype(float)
    groups = [f"p{i}" for i in rng.integers(0, n // 4, n)] if many_images else [""] * n
    logits = skill * (2 * truth - 1) + np.random.default_rng(100 + seed).normal(size=(n, 3))
    truth[rng.random((n, 3)) < 0.05] = np.nan
    keys = [f"{truth_of}/{i}.png" for i in range(n)]
    return Predictions(keys, groups, NAMES, expit(sure * logits), truth, True)


def classes(seed=0, n=200):
    rng = np.random.default_rng(seed)
    label = rng.choice(3, n, p=(0.6, 0.3, 0.1))
    probabilities = rng.dirichlet(np.ones(3), n) + 0.4 * np.eye(3)[label]
    probabilities /= probabilities.sum(1, keepdims=True)
    return Predictions([f"{seed}/{i}" for i in range(n)], [""] * n, ("n", "v", "b"), probabilities, label, False)
