"""Choosing a part of a source: some classes, or one side of a split that anyone can draw again."""

import difflib
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from loaders.errors import UserError, shorten
from loaders.sources.listing import UNKNOWN, Listing

PARTS = ("all", "train", "test")


def keep_classes(listing: Listing, names: Sequence[str]) -> Listing:
    """Only the samples of these classes, numbered in this order."""
    table = listing.table
    if table.labels.ndim > 1:
        raise UserError("--classes needs one class per image; this source has several labels per image")
    for name in names:
        if name not in listing.class_names:
            near = difflib.get_close_matches(name, listing.class_names, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {shorten(listing.class_names)}"
            raise UserError(f"there is no class {name!r}; {hint}")
    if len(set(names)) < len(names):
        raise UserError(f"--classes names {Counter(names).most_common(1)[0][0]!r} twice")
    number = np.full(len(listing.class_names) + 1, UNKNOWN)  # the last one for samples without a label
    number[[listing.class_names.index(name) for name in names]] = np.arange(len(names))
    labels = number[table.labels]
    kept = labels >= 0
    return replace(listing, items=table.take(kept, labels[kept]), class_names=tuple(names))


def shuffled(listing: Listing) -> Listing:
    """The same samples in the order of the SHA-256 of their names: random, and the same on every machine."""
    table = listing.table
    return replace(listing, items=table.take(np.argsort(digests(table.keys.tolist()), kind="stable")))


def split(listing: Listing, part: str, holdout: float) -> Listing:
    """One side of a stratified split: `holdout` of each class is the test part, the rest the training part."""
    if part not in PARTS:
        raise UserError(f"unknown part {part!r}; there are {', '.join(PARTS)}")
    if part == "all":
        return listing
    if not 0 < holdout < 1:
        raise UserError(f"--holdout is {holdout}; it must be a fraction between 0 and 1")
    table = listing.table
    in_test = held_out(table.keys, table.labels, table.groups, holdout)
    return replace(listing, items=table.take(np.flatnonzero(in_test == (part == "test"))))


def held_out(keys: np.ndarray, labels: np.ndarray, groups: np.ndarray, share: float) -> np.ndarray:
    """(n,) bool: the samples that are held out, `share` of each class.

    keys (n,) bytes; labels (n,) int64 or (n, L); groups (n,) int64, -1 for none. A function of these alone: samples
    (whole groups, where there are groups) are taken in the order of the SHA-256 of their names, so the split is the
    same on every machine, and other classes or samples joining later do not reshuffle it.
    """
    unit, size, stratum, order = _units(keys, labels, groups)
    in_test = np.zeros(len(size), dtype=bool)
    bounds = np.flatnonzero(np.diff(stratum[order], prepend=-2, append=-2))
    for lo, hi in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        members = order[lo:hi]
        wanted, taken = share * int(size[members].sum()), 0
        for member, count in zip(members.tolist(), size[members].tolist(), strict=True):
            if taken + count / 2 > wanted:
                break
            taken += count
            in_test[member] = True
    return in_test[unit]


def fold_of(keys: np.ndarray, labels: np.ndarray, groups: np.ndarray, folds: int) -> np.ndarray:
    """(n,) int64: which of `folds` each sample is in, as many groups of each class in one as in another, but for one.

    Columns as for `held_out`, and like there a function of these alone; whole groups.
    """
    unit, size, _, order = _units(keys, labels, groups)
    found = np.empty(len(size), dtype=np.int64)
    found[order] = np.arange(len(size)) % folds  # class after class, so that small classes do not meet in one fold
    return found[unit]


def _units(keys: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, ...]:
    """What stays together, a group, or a sample without one: (n,) the unit of each sample; then, of each unit, its
    size and stratum; and the units, stratum after stratum, each in the order of the SHA-256 of their names."""
    alone = np.arange(len(keys)) + (groups.max(initial=-1) + 1)
    _, first, unit, size = np.unique(
        np.where(groups != -1, groups, alone), return_index=True, return_inverse=True, return_counts=True
    )
    names = [
        b"key " + key if group == -1 else f"group {group}".encode()
        for key, group in zip(keys[first].tolist(), groups[first].tolist(), strict=True)
    ]
    stratum = _strata(labels, unit, len(first))
    return unit, size, stratum, np.lexsort((digests(names), stratum))


def digests(names: Sequence[bytes]) -> np.ndarray:
    """The first 8 bytes of the SHA-256 of each name as big-endian numbers."""
    joined = b"".join(hashlib.sha256(name).digest()[:8] for name in names)
    return np.frombuffer(joined, dtype=">u8").astype(np.uint64)


def _strata(labels: np.ndarray, unit: np.ndarray, units: int) -> np.ndarray:
    """The commonest class of each unit, of equals the one that comes first; label vectors are one stratum."""
    if labels.ndim > 1:
        return np.full(units, -1)
    pairs, first, count = np.unique(np.stack([unit, labels], 1), axis=0, return_index=True, return_counts=True)
    best = np.lexsort((first, -count, pairs[:, 0]))
    _, leading = np.unique(pairs[best, 0], return_index=True)
    return pairs[best[leading], 1]
