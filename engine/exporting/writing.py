"""A run's network in all asked forms, compared with it, in a folder that appears whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.exporting import card, facts, onnx_file, program, timm_folder
from engine.exporting.compared import ALLOWED, MOST, ROUNDED, Reals
from engine.exporting.deployed import Deployed
from engine.predicting import tuned as runs
from engine.whole import json_text, sync_folder
from loaders.errors import UserError, told

FORMS = ("onnx", "torch", "timm")
RECORD = "export.json"
_IMAGES = 32
_Runs = Callable[[Tensor], tuple[Tensor, Tensor]]


def export(
    run: str | Path,
    out: str | Path,
    forms: Sequence[str] = (),
    *,
    images: str | None = None,
    calibration: Path | None = None,
    force: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Write the network of a run, as `engine.predicting.load` finds it, into the folder `out`; the record of it.

    forms: of `FORMS`; none: all that this network and installation can have, and `say` is told which cannot and why.
    images: a pack to compare on; None: one of the run's. calibration: see `facts.of`. `force` replaces what was
    exported to that folder before.

    UserError, and nothing written: no such run; a form that cannot be; a folder that holds something else; answers that
    are further from the network's than `compared.MOST`, and than rounding takes it.
    """
    if not str(out):
        raise UserError("no folder is named to export to")
    out = Path(out)
    _check_place(out, force)
    tuned = runs.load(run)
    known = facts.of(tuned, calibration)
    chosen = _possible(known.network, forms, say)
    if tuned.precision != "fp32":
        say(f"trained in {tuned.precision}, exported in float32")
    deployed = Deployed(tuned.network, known)
    reals = Reals(tuned, deployed, images, _IMAGES)
    with _folder(out) as place:
        exported = program.traced(deployed, tuned.size) if {"onnx", "torch"} & set(chosen) else None
        found: dict[str, Any] = {}
        for form in chosen:
            file: Path
            answers: _Runs | None
            if form == "timm":
                file = timm_folder.write(tuned, known, place)
                answers = timm_folder.read(file, deployed)
            else:
                assert exported is not None
                if form == "onnx":
                    file = onnx_file.write(exported, known, place)
                    answers = onnx_file.read(file)
                else:
                    file = program.write(exported, known, place)
                    answers = program.read(file)
            found[form] = {"file": file.name} | _compared(form, answers, reals, deployed)
            say(f"{file.name}: {in_words(found[form])}")
        said = {form: in_words(each) for form, each in found.items()}
        _write_cards(place, card.text(tuned, known, chosen, said), chosen)
        record = {**known.metadata(), "forms": found}
        (place / RECORD).write_text(json_text(record, indent=1) + "\n", encoding="utf-8")
    return record


def in_words(form: dict[str, Any]) -> str:
    """How a form was compared, for people."""
    if not form["images"]:
        return "not compared: what runs it is not installed"
    apart = (
        f"on {form['images']} images at most {form['probabilities_apart']:.1e} from the network's probabilities, "
        f"{form['logits_apart']:.1e} of the largest logit"
    )
    own = form["rounding"]
    return apart if own is None else f"{apart}; its own rounding in float32 is {own[0]:.1e} and {own[1]:.1e}"


def _compared(form: str, answers: _Runs | None, reals: Reals, deployed: Deployed) -> dict[str, Any]:
    """How far answers are off, and how far rounding takes the network itself where that is more than `ALLOWED`.
    UserError where they are too far."""
    if answers is None:
        return {"images": 0, "probabilities_apart": None, "logits_apart": None, "rounding": None}
    apart, own = reals.distance(answers), None
    if not apart.within(ALLOWED):
        rounding = reals.rounding(deployed)
        if not apart.within(rounding, ROUNDED):
            raise UserError(
                f"as {form} the network answers otherwise: probabilities are {apart.probabilities:.1g} apart, logits "
                f"{apart.logits:.1g} of the largest; {MOST:g} is allowed, and its own rounding in float32 is "
                f"{rounding.probabilities:.1g} and {rounding.logits:.1g}; nothing was written. Leave that form out, or "
                "take another version of its library"
            )
        own = [rounding.probabilities, rounding.logits]
    return {
        "images": reals.count,
        "probabilities_apart": apart.probabilities,
        "logits_apart": apart.logits,
        "rounding": own,
    }


def _possible(network: str, forms: Sequence[str], say: Callable[[str], object]) -> list[str]:
    """The forms to write. UserError for one that was asked for and cannot be, or where none can."""
    reasons = {"onnx": onnx_file.missing(), "torch": None, "timm": timm_folder.missing(network)}
    for form in forms:
        if reason := reasons[form]:
            raise UserError(f"--{form}: {reason}")
    if forms:
        return [form for form in FORMS if form in forms]
    for form, reason in reasons.items():
        if reason:
            say(f"left out, {form}: {reason}")
    return [form for form, reason in reasons.items() if reason is None]


def _check_place(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder that is not there yet")
    with told(f"{out} cannot be looked at"):
        inside = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if inside and RECORD not in inside:
        raise UserError(f"{out} holds {inside[0]}, which is no export; name a folder that is not there yet")
    if inside and not force:
        raise UserError(f"{out} holds an export; name another folder, or add --force to replace it")


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, which gets its name when the block ends well; nothing stays when it does not."""
    final = out.resolve()
    temporary = final.with_name(f".{final.name}.{os.getpid()}.writing")
    replaced = final.with_name(f".{final.name}.{os.getpid()}.replaced")
    with told(f"{out} cannot be written"):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as opened:
                        os.fsync(opened.fileno())
            if final.exists():
                final.rename(replaced)
            temporary.rename(final)
            sync_folder(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)


def _write_cards(place: Path, text: str, forms: Sequence[str]) -> None:
    """In the folder of all, and in that of timm, which may travel by itself."""
    for folder in (place, *([place / timm_folder.FOLDER] if "timm" in forms else [])):
        (folder / card.FILE).write_text(text, encoding="utf-8")
