"""bench/gpu_suite.sh where there is no GPU: with programs that stand in for Python and say what they were asked."""

import re
import subprocess

import pytest

from tests.conftest import ROOT

PYTHON = """#!/bin/bash
case "$*" in
*get_device_capability*) echo 9.0 ;;
*"import omegaconf"*) exit {lacks} ;;
*) echo "asked: $*"; case "$*" in *{fails}*) exit 3 ;; esac ;;
esac
"""


@pytest.fixture
def suite(tmp_path):
    def run(lacks=0, fails="nothing-fails"):
        stand_in = tmp_path / "python"
        stand_in.write_text(PYTHON.format(lacks=lacks, fails=fails))
        stand_in.chmod(0o755)
        env = {"PYTHON": str(stand_in), "PATH": "/usr/bin:/bin"}
        words = [ROOT / "bench" / "gpu_suite.sh", tmp_path / "out"]
        return subprocess.run(words, env=env, capture_output=True, text=True)

    return run


def test_the_limits_add_up_to_eight_minutes():
    text = (ROOT / "bench" / "gpu_suite.sh").read_text()
    limits = {name: int(limit) for name, limit in re.findall(r"step \"?([\w$-]+)\"? (\d+) ", text)}
    tools = len(re.search(r"for tool in (.*); do", text)[1].split())
    assert sum(limits.values()) + (tools - 1) * limits["sanitizer-$tool"] <= 480


def test_benches_come_before_sanitizers_and_each_result_is_saved_as_it_comes(suite, tmp_path):
    done = suite()
    order = re.findall(r"▸ ([\w-]+)", done.stdout)
    assert order[:2] == ["build", "parity"]
    assert not [name for name in order[2:] if not name.startswith(("kernel", "train", "sanitizer"))]
    assert order == sorted(order, key=lambda name: name.startswith("sanitizer"))
    assert "asked: -m bench.train_step --model R152x4" in done.stdout
    assert (tmp_path / "out" / "summary.txt").read_text().startswith("ok      build")


@pytest.mark.parametrize(
    ("what", "said"), [({"lacks": 1}, "ABSENT  omegaconf"), ({"fails": "bench.kernel"}, "FAILED  kernel-R50x1 (exit 3")]
)
def test_what_was_left_out_or_failed_is_said_and_is_no_success(suite, what, said):
    done = suite(**what)
    assert done.returncode == 1
    assert said in done.stdout
    assert "ok      build" in done.stdout
