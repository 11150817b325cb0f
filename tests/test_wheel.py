"""A wheel in a clean environment, without this checkout: from a folder of images to predictions and an ONNX file."""

import csv
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import engine
from engine.cli import COMMANDS
from tests.conftest import ROOT
from tests.support import pictures

LIMIT = 300  # seconds that no step takes


def done(words, **more):
    ran = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=LIMIT, **more)
    assert ran.returncode == 0, f"{words}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as pip builds it, of a copy of the tree, with the module that `make` has compiled."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("engine", "loaders", "jobs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    if not list(tree.glob("engine/_C*.so")):
        pytest.skip("the extension is not built here, and compiling it takes minutes: make env")
    words = ["wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", out, tree]
    done([sys.executable, "-m", "pip", *words], env=os.environ | {"BOOSTERBIT_BUILT": "1"})
    (found,) = out.glob("boosterbit-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment that has the wheel, and of the one that runs the tests all but this tree."""
    home = tmp_path_factory.mktemp("environment") / "env"
    done([sys.executable, "-m", "venv", "--without-pip", home])
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done(
        [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--no-deps", "--no-index", wheel]
    )
    return home


@pytest.fixture
def away(installed, tmp_path):
    """Where the program is called: a folder that is not the checkout, of which nothing in the environment speaks."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OMPI_", "SLURM_"))}
    path = f"{installed / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {"cwd": tmp_path, "env": kept | {"OMP_NUM_THREADS": "2", "PATH": path}}


@pytest.fixture
def boosterbit(installed, away):
    """The program."""
    return lambda *words: done([installed / "bin" / "boosterbit", *words], **away)


def test_from_a_folder_of_images_to_predictions_and_an_onnx_file(boosterbit, installed, away, tmp_path):
    place = done([installed / "bin" / "python", "-c", "import engine; print(engine.__file__)"], **away)
    assert Path(place.strip()).is_relative_to(installed) and not Path(engine.__file__).is_relative_to(installed)
    pictures.folder(tmp_path / "images", per_class=6)
    for part in ("train", "test"):
        boosterbit("pack", "images", f"{part}.h5", "--part", part, "--holdout", "0.34", "--workers", "0")
    said = boosterbit("finetune", "demo", "from=random", "model=R8x0.25-8px", "data.train=train.h5",
                      "data.test=test.h5", "rule.steps=20", "folder=run", "results=results.jsonl")  # fmt: skip
    assert "AGC-SGD: fused" in said  # the extension came along
    boosterbit("predict", "run", "images", "--out", "predictions.csv", "--workers", "0")
    boosterbit("export", "run", "exported", "--onnx")
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["key"] for row in rows) == sorted(
        str(path.relative_to(tmp_path / "images")) for path in (tmp_path / "images").rglob("*.*")
    )
    table = np.array([[float(row[f"p:{name}"]) for name in ("bird", "cat", "dog")] for row in rows])
    session = onnxruntime.InferenceSession(tmp_path / "exported" / "model.onnx")
    side = session.get_inputs()[0].shape[2]
    from PIL import Image

    images = [Image.open(tmp_path / "images" / row["key"]).convert("RGB") for row in rows]
    pixels = np.stack([np.asarray(each.resize((side, side), Image.Resampling.BILINEAR)) for each in images])
    (probabilities, _) = session.run(None, {"images": pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255})
    assert np.abs(probabilities - table).max() < 0.02  # DALI, where it is, resizes otherwise by a level or two of 255


def test_what_comes_with_it(boosterbit, installed):
    listed = boosterbit()
    assert re.findall(r"^  (\w+)  ", listed, re.MULTILINE) == list(COMMANDS)
    assert "imagenet21k_r152x4" in boosterbit("pretrain", "--list")
    script = boosterbit("submit", "demo", "--nodes", "1", "--cluster", "generic", "--dry-run", "data.train=x")
    (sourced,) = re.findall(r"^source (.+/common\.sh)$", script, re.MULTILINE)
    assert Path(sourced).is_relative_to(installed) and Path(sourced).exists()
    assert f"VENV={installed}\n" in script
    assert (Path(sourced).parent / "env" / "generic.sh").exists()
    (facts,) = installed.glob("lib/python*/site-packages/boosterbit-*.dist-info/METADATA")
    extras = set(re.findall(r"^Provides-Extra: (.+)$", facts.read_text(), re.MULTILINE))
    assert {"dali", "horovod", "xray", "dicom", "onnx", "timm"} <= extras
    (files,) = installed.glob("lib/python*/site-packages/boosterbit-*.dist-info/RECORD")
    tops = {line.split("/")[0] for line in files.read_text().splitlines() if not line.startswith("..")}
    assert {top for top in tops if not top.startswith("boosterbit-")} == {"engine", "loaders", "jobs"}


def test_a_wheel_with_a_compiled_module_is_for_its_platform(wheel):
    assert wheel.name.endswith(f"{sysconfig.get_platform().replace('-', '_')}.whl")
