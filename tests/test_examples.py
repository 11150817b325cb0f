"""Examples of `--help` that need no more than what scikit-learn brings: one after another, each runs as it stands."""

import os
import shlex
import subprocess
import sys

from tests.conftest import ROOT

CHAIN = [  # of which command's help, the example, what it leaves
    ("engine.pretrain", "python -m loaders.pack sklearn:digits digits.h5", "digits.h5"),
    ("loaders.view", "python -m loaders.view digits.h5 --transform bit-eval --size 32", "digits.png"),
    ("engine.pretrain", "python -m engine.pretrain demo data.train=digits.h5 data.holdout=0.2", "runs/demo/curves.png"),
    ("engine.doctor", "python -m engine.doctor runs/demo", None),
    ("engine.finetune", "python -m engine.finetune demo from=runs/demo data.train=digits.h5 data.test=null "
     "data.holdout=0.2 folder=runs/tuned", "runs/finetune.jsonl"),
    ("engine.report", "python -m engine.report runs/finetune.jsonl", None),
    ("engine.predict", "python -m engine.predict runs/tuned digits.h5", "digits-predictions.csv"),
    ("engine.evaluate", "python -m engine.evaluate digits-predictions.csv --out evaluation", "evaluation/scores.md"),
    ("engine.export", "python -m engine.export runs/tuned exported", "exported/README.md"),
]  # fmt: skip


def run(command, folder):
    words = [sys.executable, *shlex.split(command)[1:]]
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


def test_examples_run_as_they_stand(tmp_path):
    for shown_by, example, leaves in CHAIN:
        assert f"\n  {example}" in run(f"python -m {shown_by} --help", tmp_path).stdout, (shown_by, example)
        done = run(example, tmp_path)
        assert done.returncode == 0, (example, done.stderr[-2000:])
        assert leaves is None or (tmp_path / leaves).is_file(), example
    assert "accuracy" in (tmp_path / "evaluation" / "scores.md").read_text()
