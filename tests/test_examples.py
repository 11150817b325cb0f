"""Examples of `--help` that need no more than what scikit-learn brings: one after another, each runs as it stands."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

CHAIN = [  # of which command's help, the example, what it leaves
    ("engine.pretrain", "python -m loaders.pack sklearn:digits digits.h5", "digits.h5"),
    ("loaders.view", "python -m loaders.view digits.h5 --transform bit-eval --size 32", "digits.png"),
    ("engine.pretrain", "python -m engine.pretrain demo data.train=digits.h5 data.holdout=0.2", "runs/demo/curves.png"),
    ("engine.weights", "python -m engine.weights convert runs/demo demo.safetensors", "demo.safetensors"),
    ("jobs.submit", "jobs/submit.py demo --dry-run data.train=digits.h5 data.holdout=0.2", None),
    ("jobs.supervise", "python -m jobs.supervise --folder runs/demo -- python -m engine.pretrain demo "
     "data.train=digits.h5 data.holdout=0.2", None),
    ("engine.doctor", "python -m engine.doctor runs/demo", None),
    ("engine.finetune", "python -m engine.finetune demo from=runs/demo data.train=digits.h5 data.test=null "
     "data.holdout=0.2 folder=runs/tuned", "runs/finetune.jsonl"),
    ("engine.report", "python -m engine.report runs/finetune.jsonl", None),
    ("bench.report", "python bench/report.py tables runs/*.jsonl --out report", None),
    ("engine.sweep", "python -m loaders.pack sklearn:digits train.h5 --part train --holdout 0.3", "train.h5"),
    ("engine.sweep", "python -m loaders.pack sklearn:digits test.h5 --part test --holdout 0.3", "test.h5"),
    ("engine.sweep", "python -m engine.sweep digits.yaml", "runs/digits/results.csv"),
    ("engine.predict", "python -m engine.predict runs/tuned digits.h5", "digits-predictions.csv"),
    ("engine.evaluate", "python -m engine.evaluate digits-predictions.csv --out evaluation", "evaluation/scores.md"),
    ("engine.export", "python -m engine.export runs/tuned exported", "exported/README.md"),
]  # fmt: skip


BENCHES = ["chaos", "dicom", "evaluate", "kernel", "lagging", "loader", "micro_batch", "pack_index", "scaling",
           "startup", "train_step"]  # fmt: skip


def run(command, folder):
    """As a shell in the checkout's environment would; a file that is named is the checkout's."""
    command = re.sub(r"^(python |)(bench|jobs)/", rf"\1{ROOT}/\2/", command)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


def test_examples_run_as_they_stand(tmp_path):
    makes_file = re.search(
        r"\n  (echo '(?:.|\n)*?' > digits.yaml)\n", run("python -m engine.sweep --help", tmp_path).stdout
    )
    run(makes_file[1], tmp_path)
    for shown_by, example, leaves in CHAIN:
        assert f"\n  {example}" in run(f"python -m {shown_by} --help", tmp_path).stdout, (shown_by, example)
        done = run(example, tmp_path)
        assert done.returncode == 0, (example, done.stderr[-2000:])
        assert leaves is None or (tmp_path / leaves).is_file(), example
    assert "accuracy" in (tmp_path / "evaluation" / "scores.md").read_text()


@pytest.mark.parametrize("name", BENCHES)
def test_examples_of_benches_are_taken(name):
    """They take minutes, some of them; tests/bench/ runs what they run in small."""
    module = importlib.import_module(f"bench.{name}")
    starts = rf"\n  (?:srun )?python (?:-m bench\.{name}|bench/{name}\.py)\b(.*)"
    examples = re.findall(starts, module.parser().format_help())
    assert examples
    for words in examples:
        module.parser().parse_args(shlex.split(re.split(r"  +", words)[0]))


def test_all_benches_have_an_example():
    assert sorted([*BENCHES, "report"]) == sorted(
        path.stem for path in (ROOT / "bench").glob("*.py") if path.stem != "__init__"
    )
