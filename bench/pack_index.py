"""python -m bench.pack_index: what the index of a pack of many tiny records costs: bytes, opening, shuffling.

  python -m bench.pack_index                       10 million records, 8 shards: minutes
  python -m bench.pack_index --records 10000       in seconds

The pack lies in a temporary folder, and goes with it.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.whole import write_json
from loaders.arguments import COUNT, Number, as_path
from loaders.output import as_command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m bench.pack_index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--records", action=Number, within=COUNT, default=10_000_000, help="(default: %(default)s)")
    add("--shards", action=Number, within=(1, 99_999), default=8, help="(default: %(default)s)")
    add("--bytes", action=Number, within=COUNT, default=16, help="of each record (default: %(default)s)")
    add("--repeats", action=Number, within=COUNT, default=7, help="openings that are timed (default: %(default)s)")
    add("--out", type=as_path, metavar="FILE.json")
    add("--open", type=as_path, help=argparse.SUPPRESS)
    add("--cold", action="store_true", help=argparse.SUPPRESS)
    add("--table", action="store_true", help=argparse.SUPPRESS)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    options = parser().parse_args(argv)
    from bench.measured import pack_index as index  # these bring torch, which --help need not wait for
    from bench.measured import timing
    from loaders.packs.shard import shard_paths
    from loaders.pipelines.order import Blocks, epoch_order

    if options.open:
        print(json.dumps(index.open_and_read(options.open, options.cold)))
        return 0
    if options.table:
        print(json.dumps({"table_mib": index.table_memory(options.records)}))
        return 0

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "synthetic.h5")
        took = index.seconds(lambda: index.write(path, options.records, options.shards, options.bytes))
        writing = index.peak_memory()
        size = sum(shard.stat().st_size for shard in shard_paths(path, options.shards))
        index_bytes = size - options.records * options.bytes
        warm = [index.in_a_process("--open", str(path)) for _ in range(options.repeats)]
        cold = [index.in_a_process("--open", str(path), "--cold") for _ in range(options.repeats)]
        shuffles = {
            "epoch_order_full_s": [index.seconds(partial(epoch_order, options.records, 0, e)) for e in range(3)],
            "epoch_order_blocks_s": [
                index.seconds(partial(epoch_order, options.records, 0, e, Blocks())) for e in range(3)
            ],
        }
    table = index.in_a_process("--table", "--records", str(options.records))
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
        supports="packing",
        records=options.records,
        shards=options.shards,
        index_bytes=index_bytes,
        index_bytes_per_record=round(index_bytes / options.records, 1),
        write_and_verify_s=round(took, 1),
        write_peak_mib=round(writing),
        open_mib=round(statistics.median(one["open_mib"] for one in warm)),
        table_mib=round(table["table_mib"]),
    )
    print(timing.table(times))
    print({name: value for name, value in result.items() if name.startswith(("index", "write", "open", "table"))})
    if options.out:
        write_json(options.out, result)
    return 0


if __name__ == "__main__":
    as_command(main)
