"""How often a rank asks the file system before its first step: a thousand of them start at once on one."""

import importlib.util
import json
import subprocess
import sys
import textwrap

import pytest

from bench.measured import calls
from tests.conftest import ROOT

MOST = 15_000


@pytest.mark.parametrize("backend", ["host", "dali"])
def test_a_rank_asks_the_file_system_fifteen_thousand_times_at_most(digits, tmp_path, backend):
    """The rank that leads, which also asks git for the commit; until it says that a step is done."""
    if why := calls.why_not():
        pytest.skip(why)
    if backend == "dali" and importlib.util.find_spec("nvidia.dali") is None:
        pytest.skip("DALI is not installed")
    settings = {
        "data.train": digits / "low-train.h5", "folder": tmp_path / "run", "data.backend": backend,
        "comm.backend": "local", "train.device": "cpu", "train.log_every": 1, "schedule.epochs": "null",
        "schedule.steps": 2, "schedule.warmup_steps": 0,
    }  # fmt: skip
    words = [sys.executable, "-m", "engine.pretrain", "demo", *(f"{key}={value}" for key, value in settings.items())]
    assert 1000 < len(calls.paths(words, "step 1/2", folder=ROOT)) <= MOST


def test_torch_is_the_same_however_it_is_imported():
    """What it registers while it is imported knows the modules and lines that register, and inspect is as it was."""
    code = """
        import inspect, json, os, sys
        before = inspect.getmodule, inspect.getframeinfo
        if {ours}:
            from engine.comm.startup import import_torch
            import_torch()
        import torch
        assert (inspect.getmodule, inspect.getframeinfo) == before
        assert "TORCH_DEVICE_BACKEND_AUTOLOAD" not in os.environ
        from torch._library.simple_registry import singleton
        sources = {{name: str(entry.fake_impl.kernel and entry.fake_impl.kernel.source)
                   for name, entry in singleton._data.items()}}
        assert len(sources) > 20
        print(json.dumps([sources, sorted(name for name in sys.modules if name.startswith("torch"))]))
    """
    plain, ours = (
        json.loads(
            subprocess.run(
                [sys.executable, "-c", textwrap.dedent(code).format(ours=ours)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            ).stdout  # fmt: skip
        )
        for ours in (False, True)
    )
    assert ours == plain
