"""Whether packs fit each other and the network: the same classes, numbered alike, and no more than it has outputs."""

from collections.abc import Sequence

import numpy as np

from loaders.errors import UserError
from loaders.packs.shard import Pack
from loaders.sources.listing import UNKNOWN


def open_train(place: str | Sequence[str]) -> Pack:
    """The pack or packs to train on. UserError where an image has no label."""
    train = Pack.open(place)
    _check_labelled(train)
    return train


def open_test(place: str | Sequence[str], train: Pack) -> Pack:
    """The pack or packs to score on, of which label vectors are read with the labels that `train` has.

    UserError where they have other classes.
    """
    test = Pack.open(place, labels=None if train.labels.ndim == 1 else train.class_names)
    check_same_classes(train, test)
    _check_labelled(test)
    return test


def _check_labelled(pack: Pack) -> None:
    if pack.labels.ndim == 1 and (unknown := np.flatnonzero(pack.labels == UNKNOWN)).size:
        raise UserError(
            f"{pack.path} has {len(unknown):,} images without a label, such as {pack.keys[int(unknown[0])]}: they can "
            "be predicted on, but not trained or scored on; pack without them"
        )


def check_labels(pack: Pack, num_classes: int) -> None:
    """UserError unless the pack's labels fit a head of `num_classes` outputs."""
    if pack.labels.ndim == 2:
        found = pack.labels.shape[1]
        if found != num_classes:
            raise UserError(f"pack {pack.path} has {found} labels per image, but the head {num_classes} outputs")
        return
    largest = int(pack.labels.max(initial=-1))
    if largest >= num_classes:
        raise UserError(
            f"pack {pack.path} holds label {largest} ({len(pack.class_names)} classes), but the head has only "
            f"{num_classes} outputs; set model.num_classes={max(largest + 1, len(pack.class_names))} or leave it out"
        )


def check_same_classes(train: Pack, other: Pack) -> None:
    """UserError unless both packs number the same classes alike."""
    if train.labels.ndim != other.labels.ndim:
        single, vector = (train, other) if train.labels.ndim == 1 else (other, train)
        raise UserError(
            f"{single.path} has one class per image and {vector.path} label vectors; one cannot be scored on the other"
        )
    if list(train.class_names) != list(other.class_names):
        only = sorted(set(other.class_names) ^ set(train.class_names))[:5]
        raise UserError(
            f"{other.path} does not have the classes of {train.path}: {len(other.class_names)} against "
            f"{len(train.class_names)}" + (f", differing in {', '.join(only)}" if only else ", in another order")
        )


def shared(
    train: Pack, test: Pack, keys: tuple[str, str], overlap: str, ids: tuple[np.ndarray, np.ndarray] | None = None
) -> str:
    """How many of the images to score on are trained on too, byte for byte: a line for people; empty where none is.

    keys: what the packs are called, such as `data.train` and `data.test`. ids: of the records that take part, of each
    pack; None: all. UserError where all are shared, unless `overlap` is "allow".
    """
    trained, scored = train.fingerprints, test.fingerprints
    if ids is not None:
        trained, scored = trained[ids[0]], scored[ids[1]]
    # Not `np.isin`, which sorts the millions of the training pack.
    known, number = np.unique(scored, return_inverse=True)
    at = np.searchsorted(known[1:], trained, side="right")  # the last one that is not greater
    met = np.zeros(len(known), bool)
    met[at[known[at] == trained]] = True
    both = met[number]
    count = int(both.sum())
    if not count:
        return ""
    first = int(both.argmax() if ids is None else ids[1][both.argmax()])
    named = f"such as {test.keys[first]}"
    said = f"{count:,} of {len(scored):,} images of {keys[1]} are in {keys[0]} too, byte for byte, {named}"
    if count < len(scored) or overlap == "allow":
        return f"warning: {said}"
    raise UserError(
        f"all {said.removeprefix(f'{count:,} of ')}: {test.path} would score what was learned by heart; name a pack of"
        " other images, or say data.overlap=allow"
    )
