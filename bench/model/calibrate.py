"""Fit what the cluster's facts leave open to published rows, up to a given size and no further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from bench.model.facts import Cluster, Profile
from bench.model.scaling import exposed, memory_time, slowest_exponential, slowest_normal
from loaders.errors import UserError

FITTED = ("contention", "gpu_spread", "node_jitter")


def calibrate(profile: Profile, cluster: Cluster, rows: Mapping[int, float], up_to: int) -> Cluster:
    """`cluster` with contention, gpu_spread and node_jitter (all >= 0) fitted to `rows` (GPUs → images/s).

    Only rows of 2 to `up_to` GPUs are used; one GPU is the profile. The overhead step(N) / step(1) - 1 less what is
    exposed is linear in the three, so the fit is a linear programme: least absolute deviations, which one odd row
    does not pull along. (Published rows are single runs: in Table 2, 16 GPUs are more efficient than 8.)
    """
    used = {gpus: rate for gpus, rate in sorted(rows.items()) if 1 < gpus <= up_to}
    if len(used) < 2:
        raise UserError(f"{len(used)} rows of 2 to {up_to} GPUs; a calibration needs 2 at least")
    terms, left = design(profile, cluster, used)
    fitted: dict[str, Any] = dict(zip(FITTED, least_absolute(terms, left), strict=True))
    return replace(cluster, **fitted)


def design(profile: Profile, cluster: Cluster, rows: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3) what each parameter is multiplied by, and (n,) the overhead that is to be explained, relative."""
    step = profile.step_seconds
    terms = [
        [
            memory_time(profile, cluster, gpus) / step,
            slowest_normal(gpus),
            slowest_exponential(-(-gpus // cluster.gpus_per_node)),
        ]
        for gpus in rows
    ]
    overhead = [
        gpus * profile.images_per_second / rate - 1 - exposed(profile, cluster, gpus) / step
        for gpus, rate in rows.items()
    ]
    return np.array(terms), np.array(overhead)


def least_absolute(terms: np.ndarray, values: np.ndarray) -> list[float]:
    """x >= 0 with the least sum of |terms x - values|; terms (n, k), values (n,)."""
    from scipy.optimize import linprog  # slow to import, and only a fit needs it

    n, k = terms.shape
    cost = np.concatenate([np.zeros(k), np.ones(n)])
    above = np.hstack([terms, -np.eye(n)])
    below = np.hstack([-terms, -np.eye(n)])
    found = linprog(cost, A_ub=np.vstack([above, below]), b_ub=np.concatenate([values, -values]))
    assert found.success, found.message
    return [float(x) for x in found.x[:k]]
