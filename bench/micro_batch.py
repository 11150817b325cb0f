"""python -m bench.micro_batch RECIPE key=value …: is what micro_batch=auto takes as fast as the best of a grid?

  python -m loaders.pack sklearn:digits digits.h5
  python -m bench.micro_batch demo data.train=digits.h5 --turns 1

Lets it choose as a pre-training run would, with its clock, and then times each size of the grid in turns: the passes of
the same network on the same images, on this process alone.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.config.loading import load
from engine.config.schema import AUTO, PretrainConfig
from engine.whole import write_json
from loaders.arguments import COUNT, Number, as_path
from loaders.errors import UserError
from loaders.output import as_command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m bench.micro_batch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("recipe", metavar="RECIPE", help="of engine.pretrain, or a YAML file")
    add("settings", nargs="*", metavar="key=value", help="changes to it")
    add("--turns", action=Number, within=COUNT, default=5, help="of the grid (%(default)s)")
    add("--out", type=as_path, metavar="FILE.json", help="write all of it")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    try:
        options = parser().parse_intermixed_args(argv)
        config = load(PretrainConfig, options.recipe, options.settings, "pretrain")
        from bench.measured import timing  # these bring torch, which --help need not wait for
        from engine.training import assemble
        from engine.tuning import micro_batch

        hardware = timing.hardware()  # with the load before ours
        alone = Communicator(Launch("alone"))
        parts = assemble.pretraining(replace(config, train=replace(config.train, micro_batch=AUTO)), alone)
        start = time.perf_counter()
        chosen, said = micro_batch.fastest(parts, alone)
        took = time.perf_counter() - start
        print(f"{said}\nin {took:.0f} s; the grid, {options.turns} turns:", flush=True)
        trial = micro_batch.Trial(parts, alone)
        taken: dict[int, list[float]] = {size: [] for size in micro_batch.sizes(config.train.global_batch, 1)}
        for turn in range(options.turns + 1):
            for size, times in taken.items():
                seconds = trial.seconds(size, max(1, config.train.global_batch // 4 // size))
                if turn:  # in the first, memory is found
                    times.append(seconds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rates = {size: size / statistics.median(times) for size, times in taken.items()}
    best = max(rates, key=lambda size: rates[size])
    result = timing.record(
        "python -m bench.micro_batch " + " ".join(map(str, sys.argv[1:] if argv is None else argv)),
        {f"pass of {size}": timing.summarize([1e3 * one for one in times]) for size, times in taken.items()},
        supports="monitoring",
        model=config.model.name,
        size=config.data.size,
        chosen=chosen,
        seconds_to_choose=took,
        best=best,
        images_per_second=rates,
        of_the_best_percent=100 * rates[chosen] / rates[best],
    )
    result["hardware"] = hardware
    for size, rate in rates.items():
        print(
            f"{size:>8} {rate:>10.1f} images/s{'  best' if size == best else ''}{'  chosen' if size == chosen else ''}"
        )
    print(f"chosen: {result['of_the_best_percent']:.1f}% of the best")
    if options.out:
        write_json(options.out, result)
    return 0


if __name__ == "__main__":
    as_command(main)
