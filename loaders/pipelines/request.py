"""What a pipeline is told of a batch: records, windows, flips, and the numbers of every augmentation."""

from typing import NamedTuple

import numpy as np

from loaders.packs.shard import Pack
from loaders.pipelines.transform import Transform, flips, matrices, randaugment_choices, regions, windows


class Request(NamedTuple):
    """What a pipeline needs to make one batch; arrays of b rows."""

    ids: np.ndarray  # (b,) int64
    valid: np.ndarray  # (b,) bool
    regions: np.ndarray  # (b, 4) int32 top, left, height, width of the pixels to decode
    rois: np.ndarray  # (b, 4) float32 top, left, bottom, right of the window within the region
    flips: np.ndarray  # (b,) int32, 1 to mirror
    matrices: np.ndarray  # (b, 2, 3) float32 of the affine step
    choices: np.ndarray  # (b, N, 2) int32 of RandAugment


def request(
    pack: Pack, transform: Transform, ids: np.ndarray, draws: np.ndarray, valid: np.ndarray | None = None
) -> Request:
    """Everything about a batch that can be computed before its images are read."""
    sizes = pack.sizes[ids]
    window = windows(transform, sizes, draws)
    region = regions(transform, window, sizes)
    start = window[:, :2] - region[:, :2]
    return Request(
        ids=ids,
        valid=np.ones(len(ids), dtype=bool) if valid is None else valid,
        regions=region,
        rois=np.concatenate([start, start + window[:, 2:]], axis=1).astype(np.float32),
        flips=flips(transform, draws).astype(np.int32),
        matrices=matrices(transform, draws),
        choices=randaugment_choices(transform, draws),
    )
