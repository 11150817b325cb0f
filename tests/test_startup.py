"""What a command imports before it has answered, and a room when it is imported: nothing that takes seconds."""

import ast
import importlib
import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.test_layout import MODULES

SLOW = {"torch", "torchvision", "scipy", "pandas", "sklearn", "matplotlib", "nvidia", "horovod", "timm"}

ANSWERS = [
    *(
        [f"engine.{name}", "--help"]
        for name in (
            "pretrain",
            "finetune",
            "sweep",
            "report",
            "predict",
            "evaluate",
            "weights",
            "export",
            "doctor",
            "demo",
        )  # fmt: skip
    ),
    ["engine.pretrain", "--list"],
    ["engine.finetune", "--list"],
    ["engine.pretrain", "imagenet1k_r50x1", "--print-config", "data.train=a.h5"],
    ["engine.finetune", "pets", "--print-config", "from=a", "data.train=a.h5", "data.test=b.h5", "seed=0,1"],
    ["loaders.pack", "--help"],
    ["loaders.view", "--help"],
    *(
        [f"bench.{name}", "--help"]
        for name in ("evaluate", "kernel", "loader", "pack_index", "report", "scaling", "startup", "train_step")
    ),
    ["jobs.submit", "--help"],
]
STUBS = sorted(path.parent for path in ROOT.glob("*/*/__init__.pyi"))

RUN = """
import json, runpy, sys
sys.argv = {words!r}
try:
    runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
except SystemExit as ended:
    assert not ended.code, ended.code
print("\\n" + json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""


def imported(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("words", ANSWERS, ids=" ".join)
def test_what_only_informs_imports_nothing_slow(words):
    module, *rest = words
    assert not imported(RUN.format(module=module, words=[module, *rest])) & SLOW


@pytest.mark.parametrize("room", STUBS, ids=lambda path: path.name)
def test_a_rooms_names_are_there_and_importing_it_imports_nothing_slow(room):
    name = ".".join(room.relative_to(ROOT).parts)
    code = f"import {name}, json, sys; print(json.dumps(sorted({{one.split('.')[0] for one in sys.modules}})))"
    assert not imported(code) & SLOW
    stub = ast.parse((room / "__init__.pyi").read_text())
    module = importlib.import_module(name)
    assert all(node.level == 1 for node in stub.body), "a room gives away what is its own"
    promised = {alias.name: node.module for node in stub.body for alias in node.names}
    assert promised
    assert set(module.__all__) == set(promised)
    for attribute, home in promised.items():
        assert getattr(module, attribute) is getattr(importlib.import_module(f"{name}.{home}"), attribute)
        assert f"{name}.{attribute}" not in MODULES, f"{attribute} is a module of {name} too"
