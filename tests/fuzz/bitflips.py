"""Single flipped bits in a pack, its index and its records by turns: is each of them noticed?

    python -m tests.fuzz.bitflips --cases 1000 --json docs/results/bit-flips.json

One outside of the records must be refused when the pack is opened. One in a record must be found by that record's
checksum: by `loaders.pack verify`, and when batches are read with data.check=1, which have all others. Each 100 flips
have a process of their own: a signal that ends one is a crash, more than ten minutes are a hang.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import h5py
import numpy as np

from loaders.errors import UserError
from loaders.packs.shard import Pack
from loaders.packs.writer import Record, ShardWriter, new_attributes
from loaders.pipelines.batches import eval_batches
from loaders.pipelines.order import EvalPlan
from loaders.pipelines.transform import natural_eval
from tests.conftest import ROOT
from tests.fuzz.decoding import sound
from tests.support.outcomes import commit, peak_mib, record

IMAGES = 12
PER_PROCESS = 100
LONGEST_S = 600


def write(path, seed):
    """A sound pack of `IMAGES` JPEGs and PNGs, and the range of its bytes that hold them."""
    random = np.random.default_rng(seed)
    with ShardWriter(path, ["a", "b", "c"], new_attributes({}, 1)[0]) as writer:
        for k in range(IMAGES):
            writer.add(Record(sound(random), f"{k}.image", k % 3, 40, 60, group=k // 2))
        writer.finish()
        writer.publish()
    with h5py.File(path) as file:
        begin = file["images/bytes"].id.get_offset()
        return range(begin, begin + file["images/bytes"].size)


def outcome(path, images, at):
    """What became of a pack with a flipped bit in byte `at`."""
    if at not in images:
        try:
            Pack.open(path)
        except UserError:
            return "index, refused when opened"
        return "index, unnoticed"
    pack = Pack.open(path)
    ends = images.start + np.cumsum([len(pack.record(i)) for i in range(IMAGES)])
    hit = int(np.searchsorted(ends, at, side="right"))
    if [fault.split(" (")[0] for fault in pack.verify()] != [f"record {hit}"]:
        return "record, unnoticed by verify"
    plan = EvalPlan(np.arange(IMAGES), batch=IMAGES)
    with eval_batches(pack, plan, natural_eval(32), backend="host", check=1.0, bad_budget=IMAGES) as batches:
        (batch,) = list(batches)
        found = list(batches.bad)
    named = found == [hit] and batch.ids[batch.valid].tolist() == [i for i in range(IMAGES) if i != hit]
    return "record, named by its checksum" if named else "record, unnoticed in training"


def flips(cases, seed):
    """Outcome → how often, in this process."""
    random, found = np.random.default_rng(seed), Counter()
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "pack.h5"
        images = write(path, seed)
        whole = path.read_bytes()
        index = [at for at in range(len(whole)) if at not in images]
        for case in range(cases):
            at = int(random.choice(index if case % 2 else images))
            data = bytearray(whole)
            data[at] ^= 1 << int(random.integers(8))
            path.write_bytes(data)
            found[outcome(path, images, at)] += 1
    return dict(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(flips(arguments.cases, arguments.seed)))
        return
    begun_at, total, crashes = commit(), Counter(), []
    for number, begin in enumerate(range(0, arguments.cases, PER_PROCESS)):
        cases, seed = min(PER_PROCESS, arguments.cases - begin), arguments.seed + number
        words = [sys.executable, "-m", "tests.fuzz.bitflips", "--here", "--cases", str(cases), "--seed", str(seed)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST_S)
        if done.returncode:
            crashes.append({"seed": seed, "code": done.returncode, "said": done.stderr[-600:]})
        else:
            total.update(json.loads(done.stdout.splitlines()[-1]))
        print(
            f"{begin + cases} of {arguments.cases}: {dict(total)}, {len(crashes)} crashes", file=sys.stderr, flush=True
        )
    unnoticed = sum(count for said, count in total.items() if "unnoticed" in said)
    found = {"cases": arguments.cases, "outcomes": dict(total), "unnoticed": unnoticed, "crashes": crashes}
    record(arguments.json, begun_at, arguments.cases, arguments.seed, **found, most_mib=peak_mib())


if __name__ == "__main__":
    main()
