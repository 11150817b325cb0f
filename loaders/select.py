"""Choosing a part of a source: some classes, or one side of a split that anyone can draw again."""

import difflib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from loaders.errors import UserError
from loaders.sources import Listing, shorten

PARTS = ("all", "train", "test")


def keep_classes(listing: Listing, names: Sequence[str]) -> Listing:
    """Only the samples of these classes, numbered in this order."""
    if any(not isinstance(item.label, int) for item in listing.items):
        raise UserError("--classes needs one class per image; this source has several labels per image")
    for name in names:
        if name not in listing.class_names:
            near = difflib.get_close_matches(name, listing.class_names, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {shorten(listing.class_names)}"
            raise UserError(f"there is no class {name!r}; {hint}")
    if len(set(names)) < len(names):
        raise UserError(f"--classes names {Counter(names).most_common(1)[0][0]!r} twice")
    number = {listing.class_names.index(name): i for i, name in enumerate(names)}
    items = [replace(item, label=number[item.label]) for item in listing.items if item.label in number]
    return replace(listing, items=items, class_names=tuple(names))


def split(listing: Listing, part: str, holdout: float) -> Listing:
    """One side of a stratified split: `holdout` of each class is the test part, the rest the training part.

    A function of keys, labels and groups alone: samples (whole groups, where there are groups) are taken in the
    order of the SHA-256 of their names, so the split is the same on every machine, and other classes or samples
    joining later do not reshuffle it.
    """
    if part not in PARTS:
        raise UserError(f"unknown part {part!r}; there are {', '.join(PARTS)}")
    if part == "all":
        return listing
    if not 0 < holdout < 1:
        raise UserError(f"--holdout is {holdout}; it must be a fraction between 0 and 1")
    units = defaultdict(list)
    for item in listing.items:
        units[f"group {item.group}" if item.group != -1 else f"key {item.key}"].append(item)
    strata = defaultdict(list)
    for name, members in units.items():
        strata[_stratum(members)].append((hashlib.sha256(name.encode()).digest(), members))
    test = set()
    for stratum in strata.values():
        wanted = holdout * sum(len(members) for _, members in stratum)
        taken = 0
        for _, members in sorted(stratum, key=lambda unit: unit[0]):
            if taken + len(members) / 2 > wanted:
                break
            taken += len(members)
            test.update(item.key for item in members)
    return replace(listing, items=[item for item in listing.items if (item.key in test) == (part == "test")])


def _stratum(members: list) -> int:
    """The commonest class of a unit; images with several labels are one stratum."""
    if not isinstance(members[0].label, int):
        return -1
    return Counter(item.label for item in members).most_common(1)[0][0]
