"""What is held out of training: a share, the one that packing takes with `--part test --holdout SHARE`; or a fold."""

import numpy as np

from loaders.errors import UserError
from loaders.packs.shard import Pack
from loaders.sources.select import fold_of, held_out


def parts(
    pack: Pack, share: float, ids: np.ndarray | None = None, called: str = "data.holdout"
) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids of the training part and of the held-out one, int64 each, in order; all ids and None for a share of 0.

    Stratified by class, in whole groups (patients); a function of keys, labels and groups alone. `ids`: of the records
    that are parted; None: all. `called`: the key that has the share. UserError where a part is empty.
    """
    ids = np.arange(len(pack)) if ids is None else ids
    if not share:
        return ids, None
    held = held_out(*_columns(pack, ids), share)
    if held.all() or not held.any():
        raise UserError(f"{called}={share} of {len(ids):,} images leaves nothing to train on, or to score on")
    return ids[~held], ids[held]


def fold(pack: Pack, folds: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the training part and of fold `number`, 0 to folds - 1, which are held out in turn.

    Like `parts`: stratified, in whole groups. UserError where a fold is empty.
    """
    own = fold_of(*_columns(pack, np.arange(len(pack))), folds)
    if len(np.unique(own)) < folds:
        raise UserError(f"folds={folds} of {len(pack):,} images in fewer groups: some would be empty; take fewer folds")
    return np.flatnonzero(own != number), np.flatnonzero(own == number)


def _columns(pack: Pack, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    keys = np.array([pack.keys[i].encode() for i in ids.tolist()], dtype=bytes)
    return keys, pack.labels[ids], np.full(len(ids), -1) if pack.groups is None else pack.groups[ids]
