"""Whether packs fit each other and the network: the same classes, numbered alike, and no more than it has outputs."""

from collections.abc import Sequence

from loaders.errors import UserError
from loaders.packs.shard import Pack


def open_test(place: str | Sequence[str], train: Pack) -> Pack:
    """The pack or packs to score on, of which label vectors are read with the labels that `train` has.

    UserError where they have other classes.
    """
    test = Pack.open(place, labels=None if train.labels.ndim == 1 else train.class_names)
    check_same_classes(train, test)
    return test


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
