"""Damaged JPEGs and PNGs through the input pipeline, in batches: does a decoder crash?

    python -m tests.fuzz.decoding --cases 2000 --json docs/results/fuzz-decoding.json

Each process reads a pack of damaged records with right checksums, sound ones between them. A process that ends by a
signal is a crash. The record says how many damaged ones were seen before decoding, how many by the decoder, and how
many still decode.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from engine.monitoring.metrics import processor
from loaders.packs.shard import Pack
from loaders.packs.writer import Record, ShardWriter, new_attributes
from loaders.pipelines.batches import eval_batches
from loaders.pipelines.order import EvalPlan
from loaders.pipelines.transform import natural_eval
from tests.conftest import ROOT
from tests.support.pictures import encoded, gray16, photo

KINDS = ("zeroed", "zeroed head", "random", "random head", "cut", "cut head", "spliced", "flipped", "flipped head",
         "empty", "deleted", "other sizes")  # fmt: skip
PER_PROCESS = 250


def sound(random):
    """The bytes of an image of 40 rows and 60 columns."""
    seed, kind = int(random.integers(1 << 30)), random.integers(7)
    if kind == 0:
        return encoded(photo(seed), progressive=True)
    if kind == 1:
        return encoded(photo(seed, mode="L"))
    if kind in (2, 3):
        return encoded(photo(seed), quality=int(random.integers(5, 100)), subsampling=int(random.integers(3)))
    if kind == 4:
        return encoded(photo(seed).quantize(16), "PNG")
    if kind == 5:
        from PIL import Image

        return encoded(Image.fromarray(gray16(seed)), "PNG")
    return encoded(photo(seed), "PNG")


def damaged(data, kind, random):
    """`data` with one kind of damage."""
    value = bytearray(data)
    head = min(len(value), 700)
    at, to = sorted(random.integers(0, head if "head" in kind else len(value), 2).tolist())
    if kind.startswith("zeroed"):
        value[at : to + 1] = bytes(to + 1 - at)
    elif kind.startswith("random"):
        value[at : to + 1] = random.bytes(to + 1 - at)
    elif kind.startswith("cut"):
        del value[max(at, 1) :]
    elif kind == "spliced":
        value[at:] = sound(random)[to:]
    elif kind.startswith("flipped"):
        for _ in range(int(random.integers(1, 4))):
            value[int(random.integers(head if "head" in kind else len(value)))] ^= 1 << int(random.integers(8))
    elif kind == "empty":
        value = bytearray(random.bytes(int(random.integers(0, 5))))
    elif kind == "deleted":
        del value[at : min(to, at + 9) + 1]
    else:
        value = bytearray(encoded(photo(int(random.integers(1 << 30)), 64, 33), random.choice(["JPEG", "PNG"])))
    return bytes(value)


def write(path, seed, cases):
    """A pack of `cases` damaged records and as many sound ones, in turn; the kind of damage of each record."""
    random = np.random.default_rng(seed)
    kinds = [KINDS[int(random.integers(len(KINDS)))] if k % 2 else "" for k in range(2 * cases)]
    with ShardWriter(path, ["a"], new_attributes({}, 1)[0]) as writer:
        for k, kind in enumerate(kinds):
            data = sound(random)
            writer.add(Record(damaged(data, kind, random) if kind else data, f"{k} {kind}", 0, 40, 60))
        writer.finish()
        writer.publish()
    return kinds


def feed(path, backend):
    """Read all of a pack; outcome of each damaged record → how often."""
    pack = Pack.open(path)
    plan = EvalPlan(np.arange(len(pack)), batch=64)
    batches = eval_batches(pack, plan, natural_eval(32), backend=backend, threads=2, bad_budget=len(pack))
    seen = [i for batch in batches for i in batch.ids[batch.valid].tolist()]
    assert set(seen) | set(batches.bad) == set(range(len(pack)))
    assert not [i for i in batches.bad if i % 2 == 0], "a sound record was refused"
    found = Counter("by the decoder" if "decode:" in said else "before decoding" for said in batches.bad.values())
    return dict(found) | {"decoded": len(pack) // 2 - len(batches.bad)}


def fuzz(cases, seed, backend):
    """Feed `cases` damaged records; the outcome of each, and the signals of processes that crashed."""
    total, crashes, rest = Counter(), [], cases
    with tempfile.TemporaryDirectory() as place:
        while rest > 0:
            path = Path(place) / f"{seed}.h5"
            write(path, seed, min(rest, PER_PROCESS))
            words = [sys.executable, "-m", "tests.fuzz.decoding", "--feed", str(path), "--backend", backend]
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                crashes.append({"seed": seed, "code": done.returncode, "said": done.stderr[-600:]})
            else:
                total.update(json.loads(done.stdout.splitlines()[-1]))
            path.unlink()
            rest, seed = rest - PER_PROCESS, seed + 1
    return {"cases": cases, "backend": backend, "outcomes": dict(total), "crashes": crashes}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="dali")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--feed", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.feed:
        print(json.dumps(feed(arguments.feed, arguments.backend)))
        return
    found = fuzz(arguments.cases, arguments.seed, arguments.backend)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    found |= {
        "commit": commit.stdout.strip(),
        "hardware": {"cpu": processor(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version()},
        "n": arguments.cases,
        "spread": f"counts of one run, seed {arguments.seed}",
        "supports": ["reliability"],
        "seed": arguments.seed,
    }
    if found["backend"] == "dali":
        import importlib.metadata

        names = [d.metadata["Name"] for d in importlib.metadata.distributions()]
        found["versions"] |= {n: importlib.metadata.version(n) for n in names if n and n.startswith("nvidia-dali")}
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
