"""`make demo`: the main job in small. Pack real images, pre-train on two ranks, transfer with few shots, report.

The images are the 1,797 handwritten digits that come with scikit-learn. The network learns to tell 0 to 4 apart, and
is then tuned to tell 5 to 9 apart, from 5 or 50 examples of each or all of them, beside the same from random weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from engine import cli
from engine.comm.mpirun import rank_command, rank_environment
from engine.report import report
from loaders.errors import UserError

SHOTS = ("5", "50", "full")
SEEDS = (0, 1, 2)


def run(title: str, command: list[str], ranks: int = 1, launcher: str = "auto") -> float:
    """Say and run a Python command, on several ranks where asked; returns seconds. Its failure ends the demo."""
    print(f"\n── {title}\n$ {'' if ranks == 1 else f'(on {ranks} ranks) '}python {' '.join(command)}", flush=True)
    start = time.perf_counter()
    before = [sys.executable] if ranks == 1 else rank_command(ranks, launcher)
    done = subprocess.run([*before, *command], env=rank_environment(ranks))
    if done.returncode:
        raise UserError(f"{title}: the command above ended with code {done.returncode}")
    return time.perf_counter() - start


def pack(folder: Path) -> None:
    """Digits 0 to 4 to pre-train on, 5 to 9 as the target, each with a part held out."""
    for name, classes in (("source", "0,1,2,3,4"), ("target", "5,6,7,8,9")):
        for part in ("train", "test"):
            run(
                f"pack digits {classes}, {part} part",
                ["-m", "loaders.pack", "sklearn:digits", str(folder / f"{name}-{part}.h5"), "--classes", classes,
                 "--part", part, "--holdout", "0.3", "--force"],
            )  # fmt: skip


def demo(folder: Path, ranks: int, launcher: str) -> None:
    """The whole way."""
    start = time.perf_counter()
    packs, results = folder / "packs", folder / "finetune.jsonl"
    packs.mkdir(parents=True, exist_ok=True)
    results.unlink(missing_ok=True)
    pack(packs)
    pretrained = folder / f"digits-{int(time.time())}"
    run(
        "pre-train",
        ["-m", "engine.pretrain", "demo", f"folder={pretrained}", f"data.train={packs / 'source-train.h5'}",
         f"data.val={packs / 'source-test.h5'}"],
        ranks, launcher,
    )  # fmt: skip
    network = json.loads(next((pretrained / "checkpoints").glob("step-*/about.json")).read_text())["network"]
    run(
        "fine-tune on the other digits, few shots and all, beside the same from random weights",
        ["-m", "engine.finetune", "demo", f"from={pretrained},random", f"model={network}", f"shots={','.join(SHOTS)}",
         f"seed={','.join(map(str, SEEDS))}", f"data.train={packs / 'target-train.h5'}",
         f"data.test={packs / 'target-test.h5'}", f"results={results}"],
        ranks, launcher,
    )  # fmt: skip
    table = report([results], folder / "demo.png")
    print(f"\n{table}\n\nfigure: {folder / 'demo.png'}; curves of pre-training: {pretrained / 'curves.png'}")
    print(f"{time.perf_counter() - start:.0f} seconds in all")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where everything goes (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks to pre-train on (%(default)s)")
    parser.add_argument("--launcher", default="auto", choices=("auto", "mpirun", "horovodrun", "torchrun"))
    arguments = parser.parse_args()
    cli.guard(lambda: demo(arguments.folder, arguments.ranks, arguments.launcher))


if __name__ == "__main__":
    main()
