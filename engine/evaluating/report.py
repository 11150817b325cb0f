"""All that is asked of one or two files of predictions: scores, differences, subgroups, as text, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.evaluating import case as cases
from engine.evaluating import figures, subgroups, tables
from engine.evaluating.case import Case
from engine.evaluating.evaluation import Evaluation, choose_thresholds, decisions, evaluate, without_auc
from engine.monitoring.progress import Count
from engine.predicting.table import read
from engine.statistics import temperature
from engine.statistics.scores import AUC, passes
from engine.whole import json_text, whole
from loaders.errors import UserError


@dataclass(frozen=True)
class Asked:
    """What is asked of predictions."""

    threshold: float | None = None
    """From this probability on a label is there; None: of one-of-many classes the most probable is."""
    threshold_from: Sequence[Path] | None = None
    """Predictions, for each file one, on which a threshold of each label is chosen."""
    sensitivity: float | None = None
    """The highest threshold with this sensitivity is chosen; None: by Youden's index."""
    calibrate: Sequence[Path] | None = None
    """Predictions, for each file one, on which a temperature is fitted."""
    by: str | None = None
    """Column of `table` that makes subgroups."""
    table: Path | None = None
    bands: Sequence[float] | None = None
    """Where bands of a number begin."""
    resamples: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Section:
    """A table with what has to be known beside it."""

    title: str
    table: str
    notes: Sequence[str]

    def text(self, most: int | None = None) -> str:
        """Markdown; `most`: rows and notes that are shown, with the last two rows always."""
        lines, notes = self.table.splitlines(), [f"* {note}" for note in self.notes]
        if most and len(lines) > most + 4:
            more = f"… and {len(lines) - most - 4:,} rows more, which --out FOLDER writes"
            lines = [*lines[: most + 2], more, *lines[-2:]]
        if most and len(notes) > most:
            notes = [*notes[:most], f"… and {len(notes) - most:,} more"]
        return "\n".join([f"## {self.title}", "", *lines, "", *notes, ""])


@dataclass
class Report:
    """Scores of one or two files of predictions."""

    asked: Asked
    evaluations: list[Evaluation] = field(default_factory=list)
    parts: list[dict[str, Evaluation]] = field(default_factory=list)
    """Of each file, subgroup by subgroup."""
    sections: list[Section] = field(default_factory=list)
    rows: dict[str, list[list[object]]] = field(default_factory=lambda: {"scores": [], "differences": [], "gaps": []})
    about: dict[str, Any] = field(default_factory=dict)

    def text(self, most: int | None = None) -> str:
        """All sections."""
        return "\n".join(section.text(most) for section in self.sections)

    def save(self, folder: Path, kind: str) -> list[Path]:
        """Write tables and figures, these as files that end in `kind`; their paths. Tables of another report that
        this one does not have are removed."""
        fields = {"scores": tables.SCORE_FIELDS, "differences": tables.DIFFERENCE_FIELDS, "gaps": tables.GAP_FIELDS}
        texts = {f"{name}.csv": tables.text(fields[name], rows) if rows else "" for name, rows in self.rows.items()}
        texts |= {"scores.md": self.text(), "about.json": json_text(self.about, indent=1) + "\n"}
        written = []
        for name, text in texts.items():
            if not text:
                (folder / name).unlink(missing_ok=True)
                continue
            with whole(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
            written.append(folder / name)
        return written + figures.save(self.evaluations, folder, kind, self.asked.seed)


@dataclass(frozen=True)
class _Prepared:
    """A case as it is scored, and what was chosen for it on other data."""

    case: Case
    limits: np.ndarray | None  # (k,) thresholds
    facts: dict[str, Any]


def assess(files: Sequence[Path], asked: Asked, speaks: bool = False) -> Report:
    """Score one file of predictions, or two of the same images; `speaks`: show how far that is.

    UserError for what cannot be scored.
    """
    if len(files) > 2:
        raise UserError(f"{len(files)} files of predictions; expected one, or two that are compared")
    first = cases.load(files[0])
    given = [first, *(cases.arranged(read(path), str(path), first) for path in files[1:])]
    prepared = [_prepared(asked, one, number, len(given)) for number, one in enumerate(given)]
    split = None
    if asked.by is not None and asked.table is not None:
        split = subgroups.read(asked.table, asked.by, first.predictions, asked.bands)
    found = Report(asked)
    found.about = {
        "resamples": asked.resamples,
        "seed": asked.seed,
        "predictions": [{"file": one.case.title, **one.facts} for one in prepared],
    }
    parts = 0 if split is None else len(split.rows)
    work = len(prepared) * (1 + parts) * passes(first.images) * asked.resamples
    with closing(Count(work, speaks, "resamples")) as count:
        for one in prepared:
            said = decisions(one.case, one.limits)
            result = evaluate(one.case, said, asked.resamples, asked.seed, advance=count.advance)
            found.evaluations.append(result)
            found.sections.append(Section(result.title, tables.scores(result, one.limits), _notes(one, result, asked)))
            found.rows["scores"] += tables.score_rows(result, one.limits)
        if len(given) == 2:
            _add_difference(found, first)
        if split is not None:
            found.about["subgroups"] = {"column": split.column, "joined": split.joined, "unknown": split.unknown}
            for one in prepared:
                _add_parts(found, one, split, count)
    return found


def _prepared(asked: Asked, one: Case, number: int, files: int) -> _Prepared:
    """Case `number` of so many, calibrated if that is asked for, with its thresholds."""
    facts: dict[str, Any] = {}
    original, scale = one, None
    if asked.calibrate:
        other = cases.load_other(_of_file(asked.calibrate, "--calibrate", number, files), original, "--calibrate")
        scale = temperature.fit(other.images.truth, other.images.probabilities, other.images.many)
        one = _scaled(one, scale)
        facts |= {"temperature": scale, "calibrated_on": other.title}
    if asked.threshold_from:
        path = _of_file(asked.threshold_from, "--threshold-from", number, files)
        other = cases.load_other(path, original, "--threshold-from")
        limits = choose_thresholds(other if scale is None else _scaled(other, scale), asked.sensitivity)
        rule = "Youden's index" if asked.sensitivity is None else f"a sensitivity of {asked.sensitivity:g}"
        facts |= {"thresholds": dict(zip(one.names, limits.tolist(), strict=True))}
        return _Prepared(one, limits, facts | {"chosen_by": rule, "chosen_on": other.title})
    if asked.threshold is not None:
        facts |= {"thresholds": dict.fromkeys(one.names, asked.threshold)}
        return _Prepared(one, np.full(len(one.names), asked.threshold), facts)
    return _Prepared(one, None, facts)


def _of_file(named: Sequence[Path], option: str, number: int, files: int) -> Path:
    if len(named) != files:
        raise UserError(f"{option} names {len(named)} for {files} files of predictions; one for each, in their order")
    return named[number]


def _scaled(one: Case, scale: float) -> Case:
    return cases.with_probabilities(one, temperature.apply(one.images.probabilities, scale, one.images.many))


def _add_difference(found: Report, first: Case) -> None:
    ours, theirs = found.evaluations
    name = "DeLong's test, in Obuchowski's form for groups of images" if first.grouped else "DeLong's test"
    notes = [f"On the same resamples of the same images. p: two-sided, {name}; adjusted for so many labels (Holm)."]
    found.sections.append(Section(f"{ours.title} minus {theirs.title}", tables.differences(ours, theirs), notes))
    found.rows["differences"] = tables.difference_rows(ours, theirs)


def _add_parts(found: Report, one: _Prepared, split: subgroups.Subgroups, count: Count) -> None:
    """The scores of subgroups of a case, and the gaps between them."""
    asked, said = found.asked, decisions(one.case, one.limits)
    parts = {
        name: evaluate(one.case, said, asked.resamples, asked.seed, rows, count.advance)
        for name, rows in split.rows.items()
    }
    for name, part in parts.items():
        table = tables.scores(part, one.limits)
        found.sections.append(Section(f"{part.title}: {split.column} {name}", table, _missing(part)))
        found.rows["scores"] += tables.score_rows(part, one.limits, name)
    notes = [f"Joined by {split.joined}.", "Of each score: the highest subgroup, the lowest, and what they differ by."]
    if split.unknown:
        notes.append(f"{split.unknown:,} images have no value, and are in no subgroup.")
    title = f"{one.case.title}: gaps between subgroups by {split.column}"
    found.sections.append(Section(title, tables.gaps(parts), notes))
    found.rows["gaps"] += tables.gap_rows(parts, split.column)
    found.parts.append(parts)


def _notes(one: _Prepared, result: Evaluation, asked: Asked) -> list[str]:
    """What has to be known beside the scores."""
    images, groups, facts = result.images, one.case.predictions.groups, one.facts
    over = f"the {images.count:,} groups" if any(groups) else f"the {images.count:,} images"
    notes = [
        f"{len(groups):,} images. In brackets: 95% percentile intervals of {asked.resamples:,} resamples of {over}, "
        f"seed {asked.seed}."
    ]
    if not any(groups):
        notes.append("No groups are known: if patients have several images, these intervals are too narrow.")
    elif missing := groups.count(""):
        notes.append(f"{missing:,} images have no group, and are each one of their own.")
    if "temperature" in facts:
        notes.append(f"Temperature {facts['temperature']:.4g}, fitted on {facts['calibrated_on']}.")
    if "chosen_on" in facts:
        notes.append(f"Thresholds by {facts['chosen_by']} on {facts['chosen_on']}.")
    elif one.limits is None and images.many:
        notes.append("Sensitivity, specificity and accuracy need a threshold: --threshold-from FILE, or --threshold T.")
    elif one.limits is None:
        notes.append("Sensitivity and specificity are of the most probable class.")
        never = np.bincount(images.probabilities.argmax(1), minlength=result.labels) == 0
        notes += [f"{result.rows[row]} is the most probable class of no image." for row in np.flatnonzero(never)]
    if not images.many:
        notes.append(
            "All classes together: accuracy and ECE are of the most probable class, the Brier score is a sum over them."
        )
    return notes + _missing(result)


def _missing(result: Evaluation) -> list[str]:
    """AUCs that do not exist, or that some resamples do not have."""
    notes = [f"No AUC of {name}: {why}; not in the mean." for name, why in without_auc(result)]
    for row in range(result.labels):
        lacking = int(np.isnan(result.replicates[AUC][row]).sum())
        if lacking and not np.isnan(result.values[AUC][row, 0]):
            notes.append(f"AUC of {result.rows[row]}: {lacking:,} resamples have one value only, and are left out.")
    return notes
