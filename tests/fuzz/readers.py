"""Damaged files through each reader of what others wrote: does anything but a UserError come out?

    python -m tests.fuzz.readers --cases 10000 --json docs/results/fuzz-readers.json

Hypothesis damages a sound file of each kind: bits flipped, bytes set, taken out, put in, the file cut or a part of it
moved. What is protected by checksums of its container (zip) is damaged within it, too. Each reader has a process of its
own, whose largest memory is noted; a case that takes a minute of the processor, or ten of anybody's, ends it. Readers
that are done are kept in build/fuzz-readers.jsonl: a run of the same commit, cases and seed that was stopped goes on.
"""

import argparse
import csv
import functools
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from loaders.errors import UserError
from tests.conftest import ROOT
from tests.support.outcomes import commit, peak_mib, record
from tests.support.pictures import encoded, photo

LONGEST_S, WAITED_S = 60, 600  # of the processor; of the clock, which on a busy machine says little
DONE = ROOT / "build" / "fuzz-readers.jsonl"
_KINDS = ("flip", "set", "cut", "out", "in", "move", "digits")


@st.composite
def damages(draw):
    """Up to four kinds of damage: (what, where as a share of the file, bytes)."""
    one = st.tuples(st.sampled_from(_KINDS), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9))
    return draw(st.lists(one, min_size=1, max_size=4))


def damaged(data, what):
    """`data` with all of these."""
    value = bytearray(data)
    for kind, share, more in what:
        at = int(share * len(value))
        if not value:
            break
        if kind == "flip":
            value[at] ^= 1 << more[0] % 8
        elif kind == "set":
            value[at : at + len(more)] = more
        elif kind == "cut":
            del value[at:]
        elif kind == "out":
            del value[at : at + 4 * len(more)]
        elif kind == "in":
            value[at:at] = more
        elif kind == "move":
            value[at:at] = value[at // 2 : at // 2 + 16 * len(more)]
        else:  # extremes of whole numbers
            value[at : at + 8] = (b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", b"\0\0\0\x80\0\0\0\0")[more[0] % 4]
    return bytes(value)


def within(data, what, member):
    """A zip archive with the damage inside the first member whose name ends so, under right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(out, "w") as after:
        chosen = next(name for name in before.namelist() if name.endswith(member))
        for name in before.namelist():
            inside = before.read(name)
            after.writestr(name, damaged(inside, what) if name == chosen else inside)
    return out.getvalue()


def _source(name):
    """A reader of a source: listing it, then each image."""

    def read(path):
        from loaders.packing.find import find_source, list_source
        from loaders.sources.checking import check_items

        source = str(path.parent if name in ("flowers", "cifar", "pets") else path)
        found = list_source(find_source(source, name if name != "flowers" else "flowers102"), source, None, {})
        with check_items(list(found.items), None, 90, 0) as checked:
            assert len(list(checked)) == len(found.table)

    return read


def tar_of(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


@functools.cache
def _image(number):
    return encoded(photo(number, 8, 8), "PNG")


def _lmdb(kind):
    import lmdb

    with tempfile.TemporaryDirectory() as place:
        with lmdb.open(place, map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
            for k in range(24):
                value = _image(k % 4) if kind == "folders" else pickle.dumps((_image(k % 4), k % 3))
                name = f"c{k % 3}/{k:03d}.png" if kind == "folders" else f"{k:03d}"
                transaction.put(name.encode(), value * (1 + 9 * (k == 5)) if kind == "folders" else value)
        return Path(place, "data.mdb").read_bytes()


def _field(number, data):
    """A field of a protocol buffer, less than 16 KiB."""
    size = [len(data)] if len(data) < 128 else [len(data) & 127 | 128, len(data) >> 7]
    return bytes([number << 3 | 2, *size]) + data


def _tfrecord():
    import struct

    from loaders.sources.wire.crc32c import masked_crc32c

    out = b""
    for k in range(3):
        values = {b"encoded": (1, _image(k)), b"class/label": (3, bytes([k])), b"class/synset": (1, b"n%d" % k)}
        features = {b"image/" + name: _field(kind, _field(1, value)) for name, (kind, value) in values.items()}
        data = _field(1, b"".join(_field(1, _field(1, name) + _field(2, each)) for name, each in features.items()))
        head = struct.pack("<Q", len(data))
        out += head + struct.pack("<I", masked_crc32c(head)) + data + struct.pack("<I", masked_crc32c(data))
    return out


def _pack():
    from loaders.packs.writer import Record, ShardWriter, new_attributes

    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "a.h5")
        with ShardWriter(path, ["a", "b"], new_attributes({}, 1)[0]) as writer:
            for k in range(4):
                writer.add(Record(_image(k), f"{k}.png", k % 2, 8, 8, group=k))
            writer.finish()
            writer.publish()
        return path.read_bytes()


def _read_pack(path):
    from loaders.packs.shard import Pack

    found = Pack.open(path)
    for i in range(len(found)):
        found.record(i)
    found.verify()


def _state():
    import torch

    weight = torch.ones(3, 2)
    state = {"optimizer": {"state": {0: {"momentum_buffer": weight}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
             "scaler": {}, "step": 7}  # fmt: skip
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def _checkpoint(name):
    def read(path):
        import safetensors.torch
        import torch

        from engine.saving import checkpoint

        folder = path.with_name("step-00000007")
        if not folder.exists():
            folder.mkdir()
            safetensors.torch.save_file({"a": torch.ones(3)}, folder / "weights.safetensors")
            (folder / "state.pt").write_bytes(_state())
            (folder / "about.json").write_text('{"network": "R11x0.25-32px", "step": 7}')  # as older ones: no checksums
        (folder / name).write_bytes(path.read_bytes())
        found = checkpoint.load(folder)
        assert isinstance(found.state["step"], int) and isinstance(found.about, dict)

    return read


def _weights(path):
    from engine.network import weights

    weights.load(path)


def _weights_file(form):
    from tests.support.weight_files import contents

    return functools.cache(contents)()[form]


def _small_npz():
    out = io.BytesIO()
    np.savez(out, **{"resnet/root_block/standardized_conv2d/kernel": np.ones((7, 7, 3, 16), np.float32)})
    return out.getvalue()


def _small_pth(legacy=False):
    import torch

    out = io.BytesIO()
    state = {"model": {"root.conv.weight": torch.ones(4, 3, 3, 3), "head.conv.bias": torch.zeros(3)}}
    torch.save(state, out, _use_new_zipfile_serialization=not legacy)
    return out.getvalue()


def _small_safetensors():
    import safetensors.torch
    import torch

    return safetensors.torch.save({"root.conv.weight": torch.ones(4, 3, 3, 3), "head.conv.bias": torch.zeros(3)})


def _metrics(path):
    from engine.monitoring import metrics

    for event in metrics.read(path):
        assert isinstance(event["kind"], str) and isinstance(event["step"], int)
        assert all(isinstance(value, int | float) for name, value in event.items() if name != "kind")
        assert "loss" in event


_EVENT = b'{"kind": "train", "step": 1, "loss": 2.5, "learning_rate": 0.1}\n'
_RESULT = {"metric_value": 81.25, "metric": "top1", "path": "", "seed": 0, "shot": "10", "pretrained_model": "random",
           "dataset": "pets", "last_step": 9, "network": "R50x1", "interval": [80.0, 82.0], "classes": {"a": 3.0},
           "majority": 50.0, "settings": "0123"}  # fmt: skip


def _results(path):
    from engine import report

    report.report([path], classes=True)


def _published():
    out = io.StringIO()
    table = csv.DictWriter(out, ["metric_value", "metric", "path", "seed", "shot", "pretrained_model", "dataset"])
    table.writeheader()
    for k in range(3):
        row = {"metric_value": 0.5, "metric": "test/acc", "seed": k, "shot": "10_shot", "dataset": "pets"}
        table.writerow(row | {"pretrained_model": "chexpert_bit50x1"})
    return out.getvalue().encode()


def _done(path):
    from engine import sweep

    sweep.done(path)


def _predictions(path):
    from engine.predicting import table

    found = table.read(path)
    assert len(found.keys) == len(found.probabilities) and (found.probabilities >= 0).all()


def _parquet():
    from engine.predicting import table

    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "a.parquet")
        rows = np.array([[0.25, 0.75], [1, 0]])
        table.write(path, table.Predictions(["1", "2"], ["x", ""], ("a", "b"), rows, np.array([1, -1]), False), {})
        return path.read_bytes()


def _dicom(syntax="ExplicitVRLittleEndian", frames=1):
    """An image with a window and a table; as JPEG, a colour photo."""
    from pydicom import uid
    from pydicom.dataset import FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.pixels import compress

    from tests.support import dicom

    pixels = np.stack([dicom.gradient(40, 40)] * frames) if frames > 1 else dicom.gradient(40, 40)
    table = [dicom.lut(0, list(range(99)), 12)]
    dataset = dicom.image(pixels, 12, WindowCenter="2000", WindowWidth="3000", ModalityLUTSequence=table)
    chosen = getattr(uid, syntax)
    if syntax == "JPEGBaseline8Bit":
        dataset = dicom.image(np.asarray(photo(1, 40, 40)), None, "YBR_FULL_422")
        dataset.PixelData = encapsulate([encoded(photo(1, 40, 40), "JPEG")])
        dataset["PixelData"].is_undefined_length = True
    elif chosen.is_encapsulated:
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        compress(dataset, chosen, generate_instance_uid=False)
    return dicom.encoded(dataset, chosen)


def _mats():
    from scipy.io import savemat

    out = io.BytesIO()
    savemat(out, {"labels": np.array([[1, 2, 1]])})
    return out.getvalue()


def _flowers(path):
    from scipy.io import savemat

    (path.parent / "jpg").mkdir(exist_ok=True)
    savemat(path.parent / "setid.mat", {"trnid": [[1]], "valid": [[2]], "tstid": [[3]]})
    _source("flowers")(path)


def _recipe(path):
    from engine.config.loading import load
    from engine.config.schema import PretrainConfig

    load(PretrainConfig, str(path), ["data.train=a.h5", "data.val=b.h5"], "pretrain")


def _sweep(path):
    from engine.transfer import sweep_file

    sweep_file.read(path)


_SWEEP = b"""name: transfer
checkpoints: {a: random}
shots: [1, 5]
set: {model: R50x1, lr: 0.003}
targets:
  pets: {train: a.h5, test: b.h5}
"""
_WORD = b"optim.base_lr=0.1"


def _word(path):
    from engine.config.loading import load
    from engine.config.schema import PretrainConfig

    text = path.read_bytes().decode(errors="surrogateescape")
    load(PretrainConfig, "cifar10_small", [text, "data.train=a", "data.val=b"], "pretrain")


READERS = {
    # name: a file's name, the sound file, what reads it, the member of a zip to damage instead
    "a recipe": ("a.yaml", lambda: (ROOT / "engine/config/recipes/pretrain/cifar10_small.yaml").read_bytes(), _recipe),
    "a word": ("a.txt", lambda: _WORD, _word),
    "a word, quoted": ("a.txt", lambda: b"data.train=['a b', \"c\"]", _word),
    "a sweep": ("a.yaml", lambda: _SWEEP, _sweep),
    "metrics": ("metrics.jsonl", lambda: _EVENT * 3, _metrics),
    "results": ("a.jsonl", lambda: json.dumps(_RESULT).encode() + b"\n", _results),
    "results of a sweep": ("a.jsonl", lambda: json.dumps(_RESULT).encode() + b"\n", _done),
    "published results": ("a.csv", _published, _results),
    "an LMDB of folders": ("a.lmdb", functools.partial(_lmdb, "folders"), _source("lmdb")),
    "an LMDB of pickles": ("a.lmdb", functools.partial(_lmdb, "pickled"), _source("lmdb")),
    "TFRecord": ("a.tfrecord", _tfrecord, _source("tfrecord")),
    "a tar": ("a.tar", lambda: tar_of({"a/1.png": _image(1), "b/2.png": _image(2)}), _source("tar")),
    "WebDataset": (
        "a.tar",
        lambda: tar_of({"1.png": _image(1), "1.cls": b"3", "2.png": _image(2), "2.json": b'{"label": 1}'}),
        _source("tar"),
    ),  # fmt: skip
    "a CSV": ("a.csv", lambda: b"path,label,group\na.png,1,x\nb.png,0,y\n", _source("csv")),
    "a CSV of labels": ("a.csv", lambda: b"path,label:a,label:b\na.png,1,\nb.png,-1,0\n", _source("csv")),
    "predictions": ("a.csv", lambda: b"key,group,p:a,p:b,label\n1,x,0.25,0.75,b\n2,,1,0,\n", _predictions),
    "predictions of labels": ("a.csv", lambda: b"key,p:a,label:a\n1,0.25,1\n2,0.5,\n", _predictions),
    "predictions in Parquet": ("a.parquet", _parquet, _predictions),
    "DICOM": ("a.dcm", _dicom, _source("dicom")),
    "DICOM, implicit": ("a.dcm", functools.partial(_dicom, "ImplicitVRLittleEndian", 2), _source("dicom")),
    "DICOM, deflated": ("a.dcm", functools.partial(_dicom, "DeflatedExplicitVRLittleEndian"), _source("dicom")),
    "DICOM, run lengths": ("a.dcm", functools.partial(_dicom, "RLELossless", 2), _source("dicom")),
    "DICOM, JPEG": ("a.dcm", functools.partial(_dicom, "JPEGBaseline8Bit"), _source("dicom")),
    "DICOM, JPEG 2000": ("a.dcm", functools.partial(_dicom, "JPEG2000Lossless"), _source("dicom")),
    "a .mat": ("imagelabels.mat", _mats, _flowers),
    "a pack": ("a.h5", _pack, _read_pack),
    "state.pt": ("given.pt", _state, _checkpoint("state.pt")),
    "state.pt, its pickle": ("given.pt", _state, _checkpoint("state.pt"), "data.pkl"),
    "about.json": ("given.json", lambda: b'{"network": "R50x1", "step": 7}', _checkpoint("about.json")),
    "safetensors": ("a.safetensors", _small_safetensors, _weights),
    "a .pth": ("a.pth", _small_pth, _weights),
    "a .pth, its pickle": ("a.pth", _small_pth, _weights, "data.pkl"),
    "an old .pth": ("a.pth", functools.partial(_small_pth, True), _weights),
    "an .npz": ("a.npz", _small_npz, _weights),
    "an .npz, its array": ("a.npz", _small_npz, _weights, ".npy"),
}


def fuzz(name, cases, place, random=0, limited=False):
    """Damage `cases` files of a kind, in the folder `place`; how many were refused. What else is raised comes out.

    `limited`: a case that takes too long ends the process.
    """
    file, sound, read, *member = READERS[name]
    data, path = sound(), Path(place) / file
    path.write_bytes(data)
    before = read_by(read, path)
    refused = 0

    @seed(random)
    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              phases=(Phase.generate, Phase.shrink))  # fmt: skip
    @given(damages())
    def case(what):
        nonlocal refused
        path.write_bytes(within(data, what, *member) if member else damaged(data, what))
        if limited:  # neither signal has a handler
            signal.setitimer(signal.ITIMER_PROF, LONGEST_S)
            signal.alarm(WAITED_S)
        refused += read_by(read, path)

    case()
    return refused, before


def read_by(read, path):
    """Whether the reader refuses it."""
    try:
        read(path)
    except UserError as error:
        assert str(error).strip(), "a message that says nothing"
        return True
    return False


def alone(name, cases, random):
    """Fuzz a reader in this process, with a limit on each case's time; what came of it, for JSON."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        refused, _ = fuzz(name, cases, place, random, limited=True)
    return {"refused": refused, "seconds": round(time.perf_counter() - begun, 1), "peak_mib": peak_mib()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="readers at a time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=READERS, help="this reader, here; print what came of it")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(alone(arguments.only, arguments.cases, arguments.seed)))
        return
    run = {"commit": commit(), "cases": arguments.cases, "seed": arguments.seed}
    kept = [json.loads(line) for line in DONE.read_text().splitlines()] if DONE.exists() else []
    known = {line["name"]: line["found"] for line in kept if {key: line[key] for key in run} == run}
    if run["commit"].endswith("dirty"):
        known = {}

    def one(name):
        words = ["--cases", str(arguments.cases), "--seed", str(arguments.seed), "--only", name]
        if name not in known:
            command = [sys.executable, "-m", "tests.fuzz.readers", *words]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
            if done.returncode:
                raise SystemExit(f"{done.stderr[-9000:]}\n{name}: code {done.returncode}")
            known[name] = json.loads(done.stdout.splitlines()[-1])
            DONE.parent.mkdir(exist_ok=True)
            with open(DONE, "a") as file:
                file.write(json.dumps(run | {"name": name, "found": known[name]}) + "\n")
        print(f"{name}: {arguments.cases} cases, {known[name]}", flush=True)
        return known[name]

    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = dict(zip(READERS, pool.map(one, READERS), strict=True))
    columns = {key: {name: each[key] for name, each in found.items()} for key in ("refused", "seconds", "peak_mib")}
    more = {"cases": arguments.cases, "readers": len(READERS), "uncaught": 0, "longest_s": LONGEST_S}
    most = max(columns["peak_mib"].values())
    record(arguments.json, run["commit"], arguments.cases, arguments.seed, **more, most_mib=most, **columns)


if __name__ == "__main__":
    main()
