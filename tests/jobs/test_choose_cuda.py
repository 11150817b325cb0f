"""Packages for the CUDA that is there, decided before any download: with stand-ins for nvcc and nvidia-smi."""

import subprocess

import pytest

from tests.conftest import ROOT

NVCC = "echo 'nvcc: NVIDIA (R) Cuda compiler driver'; echo 'Cuda compilation tools, release {0}, V{0}.20'"
SMI = "echo '| NVIDIA-SMI 580.65   Driver Version: 580.65   CUDA Version: {0}  |'"


@pytest.fixture
def machine(tmp_path):
    """Answers of a script on a machine that has these programs: machine(script, nvcc="12.6", smi=None, **settings)."""

    def ask(script="choose_cuda.sh", *words, nvcc=None, smi=None, where="bin", **settings):
        for name, version, text in (("nvcc", nvcc, NVCC), ("nvidia-smi", smi, SMI)):
            if version is not None:
                folder = tmp_path / (where if name == "nvcc" else "bin")
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(f"#!/bin/sh\n{text.format(version) if version else 'exit 9'}\n")
                (folder / name).chmod(0o755)
        env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "BOOSTERBIT_CUDA_ROOT": str(tmp_path / "toolkit")} | settings
        return subprocess.run([ROOT / "jobs" / "env" / script, *words], env=env, capture_output=True, text=True)

    return ask


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"nvcc": "12.6"}, "12 nvcc 12.6"),
        ({"nvcc": "13.0"}, "13 nvcc 13.0"),
        ({"nvcc": "12.6", "smi": "13.0"}, "12 nvcc 12.6"),  # what is compiled against counts
        ({"nvcc": "12.9", "where": "toolkit/bin"}, "12 nvcc 12.9"),
        ({"nvcc": "14.0"}, "13 nvcc 14.0"),  # the newest that there are packages for
        ({"smi": "12.4"}, "12 driver for CUDA 12.4"),
        ({"smi": ""}, "13 no CUDA"),  # a login node
        ({}, "13 no CUDA"),
        ({"nvcc": "13.0", "CUDA": "12"}, "12 CUDA=12"),
    ],
)
def test_the_compiler_decides_then_the_driver(machine, there, said):
    done = machine(**there)
    assert (done.returncode, done.stdout.strip()) == (0, said), done.stderr


def test_cuda_home_comes_before_the_path(machine, tmp_path):
    machine(nvcc="12.6", where="home/bin")
    assert machine(nvcc="13.0", CUDA_HOME=str(tmp_path / "home")).stdout.strip() == "12 nvcc 12.6"


@pytest.mark.parametrize(
    ("there", "said"),
    [({"nvcc": "11.8"}, "module load CUDA/13"), ({"nvcc": ""}, "set CUDA=12"), ({"CUDA": "eleven"}, "CUDA=eleven")],
)
def test_what_no_packages_exist_for_is_said_in_one_line(machine, there, said):
    done = machine(**there)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("nvcc", "torch"), [("12.6", "+cu126 --extra-index-url"), ("13.0", "torch==2.14.1 and")])
def test_make_env_says_what_it_will_install_first(machine, nvcc, torch):
    done = machine("make_env.sh", "--say", nvcc=nvcc, PYTHON="python3", CXX="sh")
    assert done.returncode == 0, done.stderr
    assert torch in done.stdout


def test_each_cuda_has_its_dali_with_the_same_versions():
    pins = {}
    for major in ("12", "13"):
        lines = (ROOT / "jobs" / "env" / f"cuda{major}.txt").read_text().splitlines()
        pins[major] = [line for line in lines if not line.startswith("#")]
    assert [pin.replace("cuda120", "cuda130").replace("cu12", "cu13") for pin in pins["12"]] == pins["13"]
