"""Which samples a few-shot run trains on, and oversampling: pure functions of labels and a seed.

Draws use NumPy's `RandomState`, whose streams NumPy guarantees never to change, so a seed names the same
samples on any machine.
"""

import re
from collections.abc import Mapping

import numpy as np

from loaders.errors import UserError, shorten


def draw(labels: np.ndarray, shots: int | str, seed: int) -> np.ndarray:
    """Sample ids of `shots` samples of each class, of a share of the samples for `"10%"`, of all for `"full"`.

    `labels` (n,) int64, classes from 0; shares, and `"full"`, also take (n, l) multi-label arrays. A share is of
    each class, rounded, one sample at least. Returns sorted int64 ids.

    Each class has its own stream, keyed by (seed, class), and gives the first `shots` samples of one
    permutation: so with the same seed the 1-shot samples are among the 5-shot ones, those of 5% among those of
    10%, and one class's draw does not depend on another's. A class with fewer samples than `shots` gives all
    that it has (see `short_classes`, for the warning). UserError: shots that are neither a positive number, a
    share, nor `full`; multi-label or empty labels.
    """
    labels = np.asarray(labels)
    if shots == "full":
        return np.arange(len(labels), dtype=np.int64)
    if is_share(shots):
        share = float(str(shots).rstrip("%")) / 100
        one = labels if labels.ndim == 1 else np.zeros(len(labels), np.int64)
        orders = [_shuffled(one, c, seed) for c in np.unique(one)]
        return np.sort(np.concatenate([order[: max(1, round(share * len(order)))] for order in orders]))
    shots = _positive(shots)
    _check_classes(labels, f"{shots} shots per class")
    chosen = [_shuffled(labels, c, seed)[:shots] for c in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def short_classes(labels: np.ndarray, shots: int | str, num_classes: int) -> dict[int, int]:
    """Class → samples it has, for every one of `num_classes` classes that has fewer than `shots`."""
    if not per_class(shots):
        return {}
    shots = _positive(shots)
    _check_classes(np.asarray(labels), f"{shots} shots per class")
    counts = np.bincount(labels, minlength=num_classes)
    return {int(c): int(n) for c, n in enumerate(counts) if n < shots}


def is_share(shots: int | str) -> bool:
    """Whether shots are a share of the images, such as 10% or 0.5%."""
    return bool(re.fullmatch(r"\d+(\.\d+)?%", str(shots), re.ASCII)) and 0 < float(str(shots)[:-1]) <= 100


def per_class(shots: int | str) -> bool:
    """Whether shots are a number of images of each class."""
    return shots != "full" and not is_share(shots)


def oversample(labels: np.ndarray, ids: np.ndarray, seed: int) -> np.ndarray:
    """`ids` with repeats, so that every class among them is as frequent as the most frequent one.

    `labels` (n,) int64 of the whole set, `ids` (m,) int64 into it. Samples of a class are repeated as equally
    often as can be: whole copies, then a random part of one, drawn from the stream (seed, class). Returns
    sorted int64 ids.
    """
    ids = np.asarray(ids, dtype=np.int64)
    own = np.asarray(labels)[ids]
    _check_classes(own, "oversampling", "data.oversample=false")
    most = np.bincount(own).max()
    chosen = [np.resize(ids[_shuffled(own, c, seed)], most) for c in np.unique(own)]
    return np.sort(np.concatenate(chosen))


def _shuffled(labels: np.ndarray, label: int, seed: int) -> np.ndarray:
    return np.random.RandomState([seed, label]).permutation(np.flatnonzero(labels == label)).astype(np.int64)


def _positive(shots: int | str) -> int:
    if isinstance(shots, bool) or not str(shots).isdecimal() or int(shots) < 1:
        raise UserError(
            f"shots is {shots!r}: expected a number of samples per class, 1 or more, a share (10%), or full"
        )
    return int(shots)


def _check_classes(labels: np.ndarray, purpose: str, instead: str = "shots=full") -> None:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{purpose} need one class per sample; found {labels.dtype} labels of shape {labels.shape}. "
            f"Multi-label sets train on all samples: use {instead}"
        )
    if len(labels) == 0:
        raise UserError(f"{purpose} need samples; the set is empty")
    if labels.min() < 0:
        raise UserError(f"{purpose} need classes from 0 on; found label {labels.min()}")


def in_words(shots: str) -> str:
    """A number of shots, for people."""
    return {"full": "full", "1": "1 shot"}.get(shots, shots if is_share(shots) else f"{shots} shots")


def by_shots(shots: str) -> tuple[int, float]:
    """Sorts numbers of shots: fewest first, then shares, full last."""
    if is_share(shots):
        return 1, float(shots[:-1])
    return (2, 0) if shots == "full" else (0, int(shots) if shots.isdecimal() else 0)


def shortage(shots: str, short: Mapping[str, int]) -> str:
    """What was done about classes that have fewer images than `shots`, name → images, for people."""
    listed = shorten([f"{name} ({count})" for name, count in short.items()])
    return f"fewer than {shots} images, all taken: {listed}"
