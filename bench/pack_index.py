"""python -m bench.pack_index: what the index of a pack of many tiny records costs: bytes, opening, shuffling."""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.measured import timing
from bench.peers.loaders import drop_cache
from loaders.packs.shard import Pack, shard_paths
from loaders.packs.writer import Record, ShardWriter, new_attributes
from loaders.pipelines.order import Blocks, epoch_order
from loaders.sources.listing import TableBuilder, file_in_folder

_KEY = "n{:08d}/n{:08d}_{:07d}.JPEG"  # as long as ImageNet's
_CLASSES = 21_842


def write(path: Path, records: int, shards: int, record_bytes: int) -> None:
    """A pack of made-up records: what is measured is the container, so the bytes are no images."""
    attributes = new_attributes({"source": "made up", "kind": "synthetic"}, shards)
    names = [f"n{k:08d}" for k in range(_CLASSES)]
    data = bytes(record_bytes)
    for k, shard in enumerate(shard_paths(path, shards)):
        with ShardWriter(shard, names, attributes[k]) as writer:
            for i in range(k * records // shards, (k + 1) * records // shards):
                label = i * _CLASSES // records
                writer.add(Record(data, _KEY.format(label, label, i), label, 375, 500))
            writer.finish()
            writer.publish()


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _memory() -> float:
    """Largest memory use of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def open_and_read(path: Path, cold: bool) -> dict[str, float]:
    """In this process: seconds to open, and to find 4,096 random records; memory that opening took, MiB."""
    if cold:
        for shard in [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}-*")):
            drop_cache(shard)
    before = _memory()
    start = time.perf_counter()
    pack = Pack.open(path)
    opened = time.perf_counter() - start
    memory = _memory() - before
    ids = np.random.default_rng(0).integers(0, len(pack), 4096)
    return {"open_s": opened, "open_mib": memory, "find_4096_s": _seconds(lambda: pack.records(ids))}


def table_memory(records: int) -> float:
    """MiB that the list of as many files takes while packing."""
    before = _memory()
    builder = TableBuilder(file_in_folder)
    for i in range(records):
        label = i * _CLASSES // records
        builder.add(_KEY.format(label, label, i), label, f"/data/train/n{label:08d}")
    assert len(builder.table()) == records
    return _memory() - before


def _in_a_process(*words: str) -> dict[str, float]:
    """What this module measures in a process of its own, so that memory is not mixed up."""
    command = [sys.executable, "-m", "bench.pack_index", *words]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pack_index", description=__doc__)
    add = parser.add_argument
    add("--records", type=int, default=10_000_000, help="(default: %(default)s)")
    add("--shards", type=int, default=8, help="(default: %(default)s)")
    add("--bytes", type=int, default=16, help="of each record (default: %(default)s)")
    add("--repeats", type=int, default=7, help="openings that are timed (default: %(default)s)")
    add("--out", type=Path, metavar="FILE.json")
    add("--open", type=Path, help=argparse.SUPPRESS)
    add("--cold", action="store_true", help=argparse.SUPPRESS)
    add("--table", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.open:
        print(json.dumps(open_and_read(options.open, options.cold)))
        return 0
    if options.table:
        print(json.dumps({"table_mib": table_memory(options.records)}))
        return 0

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "synthetic.h5")
        took = _seconds(lambda: write(path, options.records, options.shards, options.bytes))
        writing = _memory()
        size = sum(shard.stat().st_size for shard in shard_paths(path, options.shards))
        index = size - options.records * options.bytes
        warm = [_in_a_process("--open", str(path)) for _ in range(options.repeats)]
        cold = [_in_a_process("--open", str(path), "--cold") for _ in range(options.repeats)]
        shuffles = {
            "epoch_order_full_s": [_seconds(lambda e=e: epoch_order(options.records, 0, e)) for e in range(3)],
            "epoch_order_blocks_s": [
                _seconds(lambda e=e: epoch_order(options.records, 0, e, Blocks())) for e in range(3)
            ],
        }
    table = _in_a_process("--table", "--records", str(options.records))
    times = {
        "open, warm cache": timing.summarize([1e3 * one["open_s"] for one in warm]),
        "open, cold cache": timing.summarize([1e3 * one["open_s"] for one in cold]),
        "find 4,096 records": timing.summarize([1e3 * one["find_4096_s"] for one in warm]),
        "shuffle an epoch, full": timing.summarize([1e3 * s for s in shuffles["epoch_order_full_s"]]),
        "shuffle an epoch, blocks": timing.summarize([1e3 * s for s in shuffles["epoch_order_blocks_s"]]),
    }
    result = timing.record(
        "python -m bench.pack_index " + " ".join(map(str, sys.argv[1:] if argv is None else argv)),
        times,
        records=options.records,
        shards=options.shards,
        index_bytes=index,
        index_bytes_per_record=round(index / options.records, 1),
        write_and_verify_s=round(took, 1),
        write_peak_mib=round(writing),
        open_mib=round(statistics.median(one["open_mib"] for one in warm)),
        table_mib=round(table["table_mib"]),
    )
    print(timing.table(times))
    print({name: value for name, value in result.items() if name.startswith(("index", "write", "open", "table"))})
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
