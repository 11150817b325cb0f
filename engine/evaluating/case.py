"""Predictions as they are scored: labels as vectors, groups as numbers, two files in one order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.predicting.table import Predictions, read
from engine.statistics.scores import Images
from loaders.errors import UserError, shorten


@dataclass(frozen=True)
class Case:
    """Predictions with labels."""

    title: str  # what tables call it
    predictions: Predictions
    images: Images

    @property
    def names(self) -> tuple[str, ...]:
        """Of the labels or classes."""
        return self.predictions.names

    @property
    def grouped(self) -> bool:
        """Whether some group has several images."""
        return self.images.count < len(self.predictions)


def load(path: Path) -> Case:
    """A file of predictions. UserError where it is none, or has no label that is known."""
    return of(read(path), str(path))


def of(predictions: Predictions, title: str) -> Case:
    """The same of predictions at hand. UserError where no label is known."""
    truth = _truth(predictions)
    if truth is None or np.isnan(truth).all():
        raise UserError(
            f"{title} holds no known label, so that there is nothing to score; expected a column label, or label:NAME "
            "for each of several labels: predict from a source that has them"
        )
    groups = numbers(predictions.groups)
    count = int(groups.max()) + 1
    return Case(title, predictions, Images(truth, predictions.probabilities, groups, count, predictions.many))


def numbers(groups: list[str]) -> np.ndarray:
    """(n,) int64 numbers of groups in the order of their first images; an image without one is a group of its own."""
    known: dict[str | int, int] = {}
    return np.array([known.setdefault(group or i, len(known)) for i, group in enumerate(groups)], dtype=np.int64)


def _truth(predictions: Predictions) -> np.ndarray | None:
    if predictions.labels is None or predictions.many:
        return predictions.labels
    truth = np.full(predictions.probabilities.shape, np.nan)
    known = predictions.labels >= 0
    truth[known] = np.eye(len(predictions.names))[predictions.labels[known]]
    return truth


def arranged(theirs: Predictions, title: str, like: Case) -> Case:
    """Other predictions of the same images, in the order of `like`, with its groups.

    UserError where images, labels or groups are others.
    """
    ours = like.predictions
    theirs = _in_order(theirs, title, like)
    place = {key: row for row, key in enumerate(theirs.keys)}
    if missing := [key for key in ours.keys if key not in place]:
        raise UserError(f"{title} lacks images that {like.title} has: {shorten(missing)}; predict the same images")
    if len(theirs.keys) > len(ours.keys):
        more = sorted(set(theirs.keys) - set(ours.keys))
        raise UserError(f"{like.title} lacks images that {title} has: {shorten(more)}; predict the same images")
    rows = np.array([place[key] for key in ours.keys])
    groups = [theirs.groups[row] for row in rows]
    if differ := [key for key, a, b in zip(ours.keys, ours.groups, groups, strict=True) if a and b and a != b]:
        raise UserError(f"{like.title} and {title} name other groups for {shorten(differ)}; which are right?")
    truth = _truth(theirs)
    if truth is not None:
        same = (truth[rows] == like.images.truth) | (np.isnan(truth[rows]) & np.isnan(like.images.truth))
        if differ := [ours.keys[row] for row in np.flatnonzero(~same.all(1))]:
            raise UserError(f"{like.title} and {title} have other labels for {shorten(differ)}; which are right?")
    return replace(with_probabilities(like, theirs.probabilities[rows]), title=title)


def load_other(path: Path, like: Case, purpose: str) -> Case:
    """Predictions that something is chosen or fitted on, with classes or labels in the order of `like`.

    UserError: other classes or labels, or images of `like`, known by an equal name and equal probabilities.
    """
    title = f"{purpose} {path}"
    other = of(_in_order(read(path), title, like), str(path))
    ours, theirs = like.predictions, other.predictions
    row_of = {key: row for row, key in enumerate(theirs.keys)}
    shared = [
        key
        for row, key in enumerate(ours.keys)
        if (at := row_of.get(key)) is not None and (ours.probabilities[row] == theirs.probabilities[at]).all()
    ]
    if shared:
        raise UserError(
            f"{title}: {len(shared):,} of its images are scored too, in {like.title}, such as {shared[0]}; what is "
            "chosen on the images that are scored flatters: name predictions of others"
        )
    return other


def _in_order(theirs: Predictions, title: str, like: Case) -> Predictions:
    """The same with columns as `like` has them. UserError where these are others."""
    ours = like.predictions
    if ours.many != theirs.many or sorted(ours.names) != sorted(theirs.names):
        kinds = [f"{'labels' if each.many else 'classes'} {shorten(each.names)}" for each in (ours, theirs)]
        raise UserError(f"{like.title} has the {kinds[0]}, {title} the {kinds[1]}; expected the same of both")
    columns = [theirs.names.index(name) for name in ours.names]
    labels = theirs.labels
    if labels is not None:
        labels = labels[:, columns] if theirs.many else np.append(np.argsort(columns), -1)[labels]
    return replace(theirs, names=ours.names, probabilities=theirs.probabilities[:, columns], labels=labels)


def with_probabilities(case: Case, probabilities: np.ndarray) -> Case:
    """The same images with other probabilities, (n, k)."""
    predictions = replace(case.predictions, probabilities=probabilities)
    return replace(case, predictions=predictions, images=replace(case.images, probabilities=probabilities))
