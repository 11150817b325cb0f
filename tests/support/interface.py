"""What users type, and what their programs read: one line each.

`python -m tests.support.interface > tests/interface.txt` writes it anew.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from engine import cli
from engine.config.schema import FinetuneConfig, PretrainConfig
from engine.monitoring.diagnosis import COLUMNS
from engine.monitoring.lagging import Late
from engine.monitoring.ranks import Setting
from engine.transfer.sweep_file import SWEEP_KEYS, TARGET_KEYS

ROOT = Path(__file__).parents[2]
COMMANDS = [
    ["engine.pretrain"],
    ["engine.finetune"],
    ["engine.sweep"],
    ["engine.predict"],
    ["engine.evaluate"],
    ["engine.report"],
    ["engine.export"],
    ["engine.demo"],
    ["engine.doctor"],
    ["engine.weights", "convert"],
    ["loaders.pack"],
    ["loaders.pack", "verify"],
    ["loaders.pack", "info"],
    ["loaders.view"],
    ["bench.chaos"],
    ["bench.dicom"],
    ["bench.evaluate"],
    ["bench.kernel"],
    ["bench.lagging"],
    ["bench.loader"],
    ["bench.micro_batch"],
    ["bench.pack_index"],
    ["bench.scaling"],
    ["bench.startup"],
    ["bench.train_step"],
    ["engine.report", "page"],
    ["bench.report", "tables"],
    ["bench.report", "figures"],
    ["jobs.submit"],
    ["jobs.supervise"],
]
_OPTION = re.compile(r"^  (?:-\w(?:,| \S+,) )?(--[\w-]+)((?: [^ \n]+)*?)(?:  .*)?$", re.MULTILINE)


def python(*words: object) -> str:
    """What a Python command prints."""
    env = os.environ | {"COLUMNS": "400"}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def options(command: list[str]) -> list[str]:
    """The positional arguments and options of a command line, from its --help."""
    text = python("-m", *command, "--help")
    usage = " ".join(text.split("\n\n")[0].split())
    _, _, after = re.split(r"(engine|loaders|bench|jobs)[./]\w+(?:\.py)?", usage, maxsplit=1)
    places = [word for word in re.sub(r"\[-[^]]*\]+", " ", after).split() if word not in command]
    named = [f"{name}{value}" for name, value in _OPTION.findall(text) if name != "--help"]
    return [f"{' '.join(command)} {what}" for what in ([" ".join(places)] if places else []) + named]


def keys(schema: type, kind: str, prefix: str = "") -> list[str]:
    """The keys of a configuration with their types and defaults."""
    found = []
    for item in dataclasses.fields(schema):
        has_factory = item.default_factory is not dataclasses.MISSING
        default = item.default_factory() if has_factory else item.default
        name = prefix + item.name.removesuffix("_")
        if dataclasses.is_dataclass(default):
            found += keys(type(default), kind, f"{name}.")
        else:
            found.append(f"{kind} {name}: {item.type} = {default!r}")
    return found


def columns() -> list[str]:
    """What a result line, the events of metrics.jsonl, and a checkpoint's description hold, from runs of two steps."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for part in ("train", "test"):
            python("-m", "loaders.pack", "sklearn:digits", folder / f"{part}.h5", "--part", part, "--workers", "0")
        packs = f"data.train={folder / 'train.h5'}"
        python("-m", "engine.pretrain", "demo", packs, f"data.val={folder / 'test.h5'}", f"folder={folder / 'run'}",
               "schedule.epochs=null", "schedule.steps=2", "schedule.warmup_steps=1", "comm.backend=local")  # fmt: skip
        python("-m", "engine.finetune", "demo", packs, f"data.test={folder / 'test.h5'}", f"from={folder / 'run'}",
               "rule.steps=2", f"results={folder / 'results.jsonl'}", "shots=1", "comm.backend=local")  # fmt: skip
        events = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        result = json.loads((folder / "results.jsonl").read_text())
        about = json.loads(next((folder / "run" / "checkpoints").glob("step-*/about.json")).read_text())
    lines = [f"result line: {name}" for name in result] + [f"about.json: {name}" for name in about]
    kinds: dict[str, set[str]] = {}
    for event in events:
        # Which layers had clipped rows by then hangs on the last bit.
        layers = {"clipped/LAYER"} if "clipped" in event else set()
        kinds.setdefault(event["kind"], set()).update(layers, (name for name in event if "/" not in name))
    return lines + [f"metrics.jsonl {kind}: {', '.join(sorted(names))}" for kind, names in sorted(kinds.items())]


def times() -> list[str]:
    """What the lines of timing.jsonl hold, by their kind."""
    kinds = {"run": [item.name for item in dataclasses.fields(Setting)], "ranks": ["steps", *COLUMNS],
             "lagging": [item.name for item in dataclasses.fields(Late)]}  # fmt: skip
    return [f"timing.jsonl {kind}: {', '.join(sorted(['kind', 'step', *names]))}" for kind, names in kinds.items()]


def interface() -> list[str]:
    """All of it."""
    lines = [f"boosterbit {name}: python -m {module}" for name, (module, _) in cli.COMMANDS.items()]
    lines += [line for command in COMMANDS for line in options(command)]
    lines += [*keys(PretrainConfig, "pretrain"), *keys(FinetuneConfig, "finetune")]
    lines += [*(f"sweep file: {key}" for key in SWEEP_KEYS), *(f"sweep file, target: {key}" for key in TARGET_KEYS)]
    return lines + columns() + times()


if __name__ == "__main__":
    print("\n".join(interface()))
