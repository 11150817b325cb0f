"""Predictions of one trained network, or the mean of several, over all images of a source and all ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.comm.communicator import Communicator, SharedError
from engine.comm.device import choose_device, refuse_shared_gpus
from engine.monitoring import metrics
from engine.monitoring.progress import Count
from engine.predicting import images, table, tuned
from engine.predicting.images import Choice
from engine.predicting.table import Predictions
from engine.predicting.tuned import Tuned
from engine.training.precision import Precision
from loaders.errors import UserError, shorten
from loaders.packs.shard import Pack
from loaders.pipelines import transform
from loaders.pipelines.batches import Batches, eval_batches
from loaders.pipelines.order import EvalPlan

_LISTED = 20  # unreadable images that are printed


@dataclass(frozen=True)
class How:
    """What changes nothing about the predictions but their rounding."""

    batch: int = 64
    """Images at once on each rank."""
    precision: str | None = None
    """None: as each run was trained in."""
    device: str = "auto"
    threads: int = 2
    """Decoding threads of each rank."""
    backend: str = "auto"


def predict(
    runs: Sequence[Path],
    source: str,
    out: Path,
    comm: Communicator,
    choice: Choice | None = None,
    how: How | None = None,
    *,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write what the networks of `runs` say of the images of `source`, the mean of their probabilities, into `out`.

    All ranks call it, and get what `OUT.about.json` says; memory does not grow with the number of images but for what
    is known of each (name, label). Images that cannot be read are left out, and listed there and on stderr. `quiet`:
    without a word. SharedError on all ranks for what cannot be used, such as runs that differ in their classes.
    """
    choice, how = choice or Choice(), how or How()
    speaks = comm.leads and not quiet
    with comm.together():
        device = choose_device(how.device, comm)
        members = [tuned.load(run, device) for run in runs]
        _check(members, runs)
        _check_place(out, source)
    refuse_shared_gpus(device, comm)
    first = members[0]
    with images.opened(source, choice, out, comm, quiet=quiet) as found:
        labels, note = known(found.pack, first.names, first.many)
        for line in (*found.notes, *filter(None, [note])) if speaks else ():
            print(line, flush=True)
        about = _about(members, runs, found.about)
        file = table.writing(out, first.names, many=first.many, labelled=labels is not None, about=about)
        with file if comm.leads else nullcontext(_nothing) as add:
            bad, rate = _work(members, found.pack, labels, how, device, comm, speaks, add)
            about |= {"images": len(found.pack) - len(bad), "unreadable": [*map(list, found.unreadable), *bad]}
    if speaks:
        _report(about, source, out, rate)
    return about


def known(pack: Pack, names: Sequence[str], many: bool) -> tuple[np.ndarray | None, str]:
    """The labels of a pack, of the classes or labels `names`, as `Predictions` has them; and what there is to say."""
    own, place = pack.class_names, {name: number for number, name in enumerate(names)}
    if not own:
        return None, ""
    if many != (pack.labels.ndim > 1):
        kinds = ("several labels per image", "one class per image")
        return None, f"without labels: it has {kinds[many]}, and the network is for {kinds[not many]}"
    strange = [name for name in own if name not in place]
    if len(strange) == len(own):
        return None, f"without labels: it has {shorten(own)}, and the network is for {shorten(names)}"
    said = f"not known to the network, so images have no such label: {shorten(strange)}" if strange else ""
    if not many:
        numbers = np.array([*(place.get(name, -1) for name in own), -1])  # the last one is of -1, unknown
        return numbers[pack.labels], said
    labels = np.full((len(pack), len(names)), np.nan)
    for column, name in enumerate(own):
        if name in place:
            values = pack.labels[:, column]
            labels[:, place[name]] = np.where(np.isnan(values), np.nan, values > 0.5)
    return labels, said


def _check(members: list[Tuned], runs: Sequence[Path]) -> None:
    """UserError unless all networks are for the same classes, and each another one."""
    first = members[0]
    for run, member in zip(runs, members, strict=True):
        if member.many != first.many:
            single, several = (run, runs[0]) if first.many else (runs[0], run)
            raise UserError(f"{single} is for one class per image and {several} for several labels: they have no mean")
        if member.names != first.names:
            only = sorted(set(member.names) ^ set(first.names))
            raise UserError(
                f"{run} is for other classes than {runs[0]}: {shorten(member.names)} against {shorten(first.names)}"
                + ("" if only else ", in another order")
            )
    seen: dict[str, Path] = {}
    for run, member in zip(runs, members, strict=True):
        if member.checksum in seen:
            raise UserError(
                f"{run} is the same network as {seen[member.checksum]}, and would count twice; name it once"
            )
        seen[member.checksum] = run


def _check_place(out: Path, source: str) -> None:
    if out.is_dir():
        raise UserError(f"{out} is a folder; name the file itself, such as {out / 'predictions.csv'}")
    if out.exists() and Path(source).exists() and out.samefile(source):
        raise UserError(f"the predictions would replace {source}, which they are made of; name another --out")


def _work(
    members: list[Tuned],
    pack: Pack,
    labels: np.ndarray | None,
    how: How,
    device: torch.device,
    comm: Communicator,
    speaks: bool,
    add: Any,
) -> tuple[list[list[str]], float]:
    """Hand the predictions on in the order of the pack, batch by batch; key and reason of each record that could not be
    used, and images a second."""
    plan = EvalPlan(np.arange(len(pack)), min(how.batch, -(-len(pack) // comm.size)), comm.rank, comm.size)
    reading: dict[str, Any] = {
        "device": str(device),
        "threads": how.threads,
        "backend": how.backend,
        "check": 1.0,
        "bad_budget": len(pack),
    }
    first = members[0]
    with ExitStack() as stack, closing(Count(len(pack), speaks)) as count:
        streams = {
            each: stack.enter_context(eval_batches(pack, plan, each, **reading))
            for each in dict.fromkeys(member.transform for member in members)
        }
        for mine in _batches(members, streams, how, device, len(plan)):
            rows = comm.gather(mine, "predictions")
            rows = rows[rows[:, 1] > 0]
            ids, probabilities = rows[:, 0].astype(np.int64), rows[:, 2:]
            if not np.isfinite(probabilities).all():
                wrong = ids[~np.isfinite(probabilities).all(1)]
                raise SharedError(
                    f"what the network says of {pack.keys[int(wrong[0])]} is no number; try precision fp32"
                )
            if comm.leads:
                groups = ["" if group < 0 else str(group) for group in _groups(pack, ids)]
                keys = [pack.keys[i] for i in ids.tolist()]
                chosen = None if labels is None else labels[ids]
                add(Predictions(keys, groups, first.names, probabilities, chosen, first.many))
            count.advance(len(rows))
        found = {record: reason for stream in streams.values() for record, reason in stream.bad.items()}
        rate = count.rate
    bad = {record: reason for each in comm.exchange(found) for record, reason in each.items()}
    return [[pack.keys[record], bad[record]] for record in sorted(bad)], rate


@torch.inference_mode()
def _batches(
    members: list[Tuned], streams: dict[transform.Transform, Batches], how: How, device: torch.device, number: int
) -> Iterator[np.ndarray]:
    """This rank's (b, 2 + k) float64 of each batch: number of the record, whether it counts, probabilities."""
    for _ in range(number):
        batches = {each: next(stream) for each, stream in streams.items()}
        total, valid = torch.zeros((), dtype=torch.float64), None
        for member in members:
            batch = batches[member.transform]
            total = total + probabilities(member, batch.images, _precision(member, how.precision, device)).cpu()
            valid = batch.valid.cpu() if valid is None else valid & batch.valid.cpu()
        assert valid is not None
        ids = batches[members[0].transform].ids.cpu().double()
        yield torch.cat([ids[:, None], valid.double()[:, None], total / len(members)], 1).numpy()


def probabilities(member: Tuned, images: Tensor, precision: Precision) -> Tensor:
    """(b, 3, size, size) float32, normalized → (b, k) float64: a sigmoid of each label, or a softmax of the classes."""
    precision.prepare()
    with torch.inference_mode(), precision.autocast():
        logits = member.network(images)
    return logits.double().sigmoid() if member.many else logits.double().softmax(1)


def _precision(member: Tuned, wanted: str | None, device: torch.device) -> Precision:
    own = "fp32" if member.precision == "tf32" and device.type != "cuda" else member.precision
    return Precision(wanted or own, device)


def _groups(pack: Pack, ids: np.ndarray) -> list[int]:
    return [-1] * len(ids) if pack.groups is None else pack.groups[ids].tolist()


def _nothing(part: Predictions) -> None:
    """What ranks do that do not write."""


def _about(members: list[Tuned], runs: Sequence[Path], data: dict[str, Any]) -> dict[str, Any]:
    described = [transform.as_fields(member.transform) for member in members]
    return {
        "runs": [
            {
                "path": str(run),
                "checkpoint": str(member.path),
                "checksum": member.checksum,
                "network": member.about["network"],
                "step": member.about.get("step"),
                "precision": member.precision,
                "transform": fields,
            }
            for run, member, fields in zip(runs, members, described, strict=True)
        ],
        "transform": described[0] if all(fields == described[0] for fields in described) else None,
        "data": data,
        "commit": metrics.commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _report(about: dict[str, Any], source: str, out: Path, rate: float) -> None:
    bad = about["unreadable"]
    for key, reason in bad[:_LISTED]:
        print(f"unreadable: {key}: {reason}", file=sys.stderr)
    if len(bad) > _LISTED:
        print(f"… {len(bad):,} in all, listed in {table.about_path(out)}", file=sys.stderr)
    left_out = f", {len(bad):,} unreadable left out" if bad else ""
    print(f"{source}: {about['images']:,} images{left_out}, {rate:,.0f} images/s → {out}", flush=True)
