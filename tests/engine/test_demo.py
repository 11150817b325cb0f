"""The images of `make demo`."""

import json

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from engine import demo
from engine.report import report
from tests.conftest import ROOT


def test_the_digits_are_written_once_each_clean_or_under_noise(tmp_path):
    demo.write_images(tmp_path / "a")
    demo.write_images(tmp_path / "b")
    digits, found, differences = load_digits(), set(), []
    for file in sorted((tmp_path / "a").rglob("*.png")):
        domain, label, number = file.parts[-3], file.parts[-2], int(file.stem)
        image = np.asarray(Image.open(file)) / 255 * 16
        assert file.read_bytes() == (tmp_path / "b" / domain / label / file.name).read_bytes()
        assert int(label) == digits.target[number]
        assert (domain == "clean") == (number < demo.CLEAN)
        if domain == "clean":
            assert np.abs(image - digits.images[number]).max() < 0.04  # half a level of 255
        else:  # of levels in the middle, which the noise seldom takes out of the range
            middle = np.abs(digits.images[number] - 8) < 2
            differences.append((image - digits.images[number])[middle])
        found.add(number)
    assert found == set(range(1797))
    assert abs(np.concatenate(differences).std() - demo.NOISE) < 0.3


def test_the_readme_shows_what_the_demo_prints_of_its_record():
    printed = f"{report([ROOT / 'docs' / 'results' / 'demo.jsonl'])}\n\n{demo.CHOSEN}"
    assert printed in (ROOT / "README.md").read_text()


def test_the_record_has_the_runs_of_the_demo():
    lines = [json.loads(line) for line in (ROOT / "docs" / "results" / "demo.jsonl").read_text().splitlines()]
    found = sorted((line["pretrained_model"], line["shot"], line["seed"]) for line in lines)
    assert found == sorted((s, k, seed) for s in ("demo", "random") for k in demo.SHOTS for seed in demo.SEEDS)
