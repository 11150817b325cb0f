"""python -m bench.startup PACK: what a rank asks of the file system until its first step, as it lies and staged.

  python -m loaders.pack sklearn:digits digits.h5
  python -m bench.startup digits.h5 --stage /dev/shm          needs strace, and room for the environment

Packs the environment as `jobs/submit.py --stage` does, unpacks it, and counts (strace) the calls of one rank that
trains `demo` on PACK: all of them, and those to places that a cluster's nodes share: environment, its Python, tree,
data, run folder.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.whole import json_text, write_json
from loaders.arguments import COUNT, Number, as_path
from loaders.errors import UserError
from loaders.output import as_command

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "comm.backend": "local", "train.device": "cpu", "train.log_every": 1, "schedule.epochs": "null",
    "schedule.steps": 2, "schedule.warmup_steps": 0,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m bench.startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("pack", metavar="PACK", type=as_path, help="data.train of the rank")
    add("--stage", metavar="DIR", type=as_path, required=True, help="where it is unpacked, such as /dev/shm")
    add("--archive", metavar="FILE.tar", type=as_path, help="where it is packed (beside --stage)")
    add("--turns", action=Number, within=COUNT, default=3, help="of unpacking (default: %(default)s)")
    add("--backends", default="host,dali", help="pipelines to count (default: %(default)s)")
    add("--out", type=as_path, metavar="FILE.json")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    options = parser().parse_args(argv)
    from bench.measured import calls, timing  # torch, which --help need not wait for

    venv = Path(sys.prefix)
    try:
        if why := calls.why_not():
            raise UserError(f"{why}: nothing can be counted")
        if sys.prefix == sys.base_prefix:
            raise UserError(
                f"{sys.executable} is of no environment that could be staged; run it with that of `make env`"
            )
        hardware = timing.hardware()  # with the load before ours
        with tempfile.TemporaryDirectory(dir=options.stage.resolve()) as place:
            archives = [(options.archive or Path(place, "env.tar")).resolve(), Path(place, "tree.tar")]
            stage = [str(ROOT / "jobs" / "env" / "stage.sh")]
            took = _milliseconds([*stage, "pack", *archives], {"VENV": str(venv)})
            unpacked = Path(place, "node")
            each = []
            for _ in range(options.turns):
                subprocess.run(["rm", "-rf", unpacked], check=True)
                each.append(_milliseconds([*stage, "unpack", *archives, unpacked]))
            counted = {}
            for backend in options.backends.split(","):
                for name, env, tree in (("shared", venv, ROOT), ("staged", unpacked / "venv", unpacked / "tree")):
                    found = _rank(env, tree, options.pack.resolve(), Path(place, "shared"), backend)
                    shared = [venv, ROOT, Path(sys.base_prefix), options.pack.resolve().parent, Path(place, "shared")]
                    away = calls.below([path for path in found if not calls.below([path], [unpacked])], shared)
                    counted[f"{backend}, {name}"] = {"calls": len(found), "to_shared": away}
            sizes = {path.stem: path.stat().st_size for path in archives}
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = timing.record(
        "python -m bench.startup " + " ".join(map(str, sys.argv[1:] if argv is None else argv)),
        {"pack": timing.summarize([took]), "unpack": timing.summarize(each)},
        supports="startup",
        bytes=sizes,
        calls_until_the_first_step=counted,
    )
    result["hardware"] = hardware
    print(json_text({key: result[key] for key in ("bytes", "calls_until_the_first_step", "milliseconds")}, indent=1))
    if options.out:
        write_json(options.out, result)
    return 0


def _milliseconds(words: Sequence[str | Path], env: dict[str, str] | None = None) -> float:
    """How long a command takes. UserError with what it says where it fails."""
    start = time.perf_counter()
    done = subprocess.run(
        list(words), env={**os.environ, **(env or {})}, capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        raise UserError(f"{words[0]} ended with code {done.returncode}: {done.stderr.strip()}")
    return 1e3 * (time.perf_counter() - start)


def _rank(venv: Path, tree: Path, pack: Path, shared: Path, backend: str) -> list[str]:
    """Paths of a rank's calls until its first step; it runs in `shared`."""
    from bench.measured import calls, timing

    shared.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        settings = {**SETTINGS, "data.train": pack, "data.backend": backend, "folder": folder}
        words = ["python", "-m", "engine.pretrain", "demo", *(f"{key}={value}" for key, value in settings.items())]
        env = {**os.environ, "PATH": f"{venv}/bin:{os.environ['PATH']}", "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1",
               "BOOSTERBIT_COMMIT": timing.commit()}  # fmt: skip
        return calls.paths(words, "step 1/2", folder=shared, env=env)


if __name__ == "__main__":
    as_command(main)
