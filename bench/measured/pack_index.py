"""What `bench/pack_index.py` measures: the index of a pack of many tiny records."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.peers.turns import drop_cache
from loaders.packs.shard import Pack, shard_paths
from loaders.packs.writer import Record, ShardWriter, new_attributes
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


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_memory() -> float:
    """Largest memory use of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def open_and_read(path: Path, cold: bool) -> dict[str, float]:
    """In this process: seconds to open, and to find 4,096 random records; memory that opening took, MiB."""
    if cold:
        for shard in [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}-*")):
            drop_cache(shard)
    before = peak_memory()
    start = time.perf_counter()
    pack = Pack.open(path)
    opened = time.perf_counter() - start
    memory = peak_memory() - before
    ids = np.random.default_rng(0).integers(0, len(pack), 4096)
    return {"open_s": opened, "open_mib": memory, "find_4096_s": seconds(lambda: pack.records(ids))}


def table_memory(records: int) -> float:
    """MiB that the list of as many files takes while packing."""
    before = peak_memory()
    builder = TableBuilder(file_in_folder)
    for i in range(records):
        label = i * _CLASSES // records
        builder.add(_KEY.format(label, label, i), label, f"/data/train/n{label:08d}")
    assert len(builder.table()) == records
    return peak_memory() - before


def in_a_process(*words: str) -> dict[str, float]:
    """What this module measures in a process of its own, so that memory is not mixed up."""
    command = [sys.executable, "-m", "bench.pack_index", *words]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, encoding="utf-8", errors="replace").stdout
    )
