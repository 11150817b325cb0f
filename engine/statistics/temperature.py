"""Temperature scaling: one number, fitted on other data, by which all logits are divided (Guo et al., 2017).

Probabilities are enough: of one-of-many classes their logarithms are the logits, but for a constant of each image that
makes no difference; of several labels at once log(p / (1 - p)) is.
"""

from __future__ import annotations

import numpy as np

from loaders.errors import UserError

BOUNDS = (0.01, 100.0)
_LEAST = 1e-15
"""What stands for a probability of 0, whose logarithm is infinite."""


def fit(truth: np.ndarray, probabilities: np.ndarray, many: bool) -> float:
    """The temperature with the smallest mean negative log-likelihood of the known labels.

    truth (n, k) of 0, 1, or NaN for unknown; probabilities (n, k); many: several labels at once. UserError where no
    label is known, or the likelihood has no maximum within BOUNDS: where all labels are predicted rightly, say.
    """
    from scipy.optimize import minimize_scalar

    known = ~np.isnan(truth) if many else ~np.isnan(truth[:, 0])
    if not known.any():
        raise UserError("no label is known, so that no temperature can be fitted")
    logits = _logits(probabilities, many)[known]
    positive = truth[known] > 0.5

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        if many:
            return float(np.logaddexp(0, np.where(positive, -scaled, scaled)).mean())
        return float((np.logaddexp.reduce(scaled, axis=1) - scaled[positive]).mean())

    low, high = np.log(BOUNDS)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-9})
    if min(loss(low), loss(high)) < found.fun + 1e-9:
        raise UserError(
            f"no temperature from {BOUNDS[0]:g} to {BOUNDS[1]:g} fits: the labels are predicted too well, or worse "
            "than by chance; calibrate on images that the network has not been trained on"
        )
    return float(np.exp(found.x))


def apply(probabilities: np.ndarray, temperature: float, many: bool) -> np.ndarray:
    """(n, k) probabilities after their logits are divided by a temperature."""
    scaled = _logits(probabilities, many) / temperature
    if many:
        return np.exp(-np.logaddexp(0, -scaled))
    return np.exp(scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True))


def _logits(probabilities: np.ndarray, many: bool) -> np.ndarray:
    clipped = np.clip(probabilities, _LEAST, 1 - _LEAST if many else 1)
    return np.log(clipped) - np.log1p(-clipped) if many else np.log(clipped)
