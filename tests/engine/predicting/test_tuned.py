import json
import shutil

import numpy as np
import pytest
import torch

from engine import finetune
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.config.loading import load as load_config
from engine.config.schema import FinetuneConfig
from engine.network import bit, weights
from engine.predicting import tuned
from engine.saving import checkpoint
from loaders.errors import UserError
from loaders.pipelines import transform


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """The folder of a fine-tuning run of two steps."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    words = [f"data.train={digits / 'high-train.h5'}", f"data.test={digits / 'high-test.h5'}", "from=random",
             "model=R8x0.25-8px", "rule.steps=2", f"folder={folder}", f"results={folder.parent / 'results.jsonl'}",
             "precision=fp32"]  # fmt: skip
    config = load_config(FinetuneConfig, "demo", words, "finetune")
    finetune.finetune(config, Communicator(Launch("alone")), quiet=True)
    return folder


def test_a_run_tells_its_network_and_what_its_images_need(run):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    found = tuned.load(run)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (found.names, found.many, found.precision) == (tuple("56789"), False, "fp32")
    assert found.about["network"] == "R8x0.25-8px" and found.config["rule"]["steps"] == 2
    assert not found.network.training and found.size == found.transform.size
    place = checkpoint.find(run)
    assert found.path == place
    own = bit.build("R8x0.25-8px", 5)
    weights.apply(own, weights.load(place), new_head=False)
    images = torch.randn(3, 3, found.size, found.size)
    torch.testing.assert_close(found.network(images), own.eval()(images))
    described = checkpoint.describe(place)
    assert (list(found.transform.mean), list(found.transform.std)) == (described["mean"], described["std"])


def test_the_weights_that_were_scored_are_taken(run, tmp_path):
    """Of a run that keeps the best these, whatever the last are; a checkpoint that is named is the one."""
    shutil.copytree(run, tmp_path / "run")
    (place,) = checkpoint.complete(tmp_path / "run" / "checkpoints")
    shutil.copytree(place, tmp_path / "run" / "best" / place.name)
    assert tuned.load(tmp_path / "run").path == place
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace("keep_best: false", "keep_best: true"))
    assert tuned.load(tmp_path / "run").path.parent.name == "best"
    assert tuned.load(place).path == place


def changed(run, tmp_path, change):
    """A copy of the run whose checkpoint describes itself otherwise, under a right checksum."""
    shutil.copytree(run, tmp_path / "run")
    (place,) = checkpoint.complete(tmp_path / "run" / "checkpoints")
    about = json.loads((place / "about.json").read_text())
    change(about)
    (place / "about.json").write_text(json.dumps(checkpoint._sealed(about)))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda about: about.pop("transform"), "does not say its transform"),
        (lambda about: about["transform"].pop("kind"), "'kind'"),
        (lambda about: about["transform"].update(kind="zoom"), "unknown transform 'zoom'"),
        (lambda about: about["transform"].update(mean=[1, 2]), "description of a checkpoint"),
        (lambda about: about.update(network="R51x1"), "R51x1"),
        (lambda about: about.update(num_classes=7), "for 5 classes"),
    ],
)
def test_a_description_that_does_not_do_is_refused(run, tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        tuned.load(changed(run, tmp_path, change))


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        tuned.load(tmp_path / "none")
    with pytest.raises(UserError, match="holds no checkpoint"):
        tuned.load(tmp_path)


def test_damaged_weights_are_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (place,) = checkpoint.complete(tmp_path / "run" / "checkpoints")
    data = bytearray((place / checkpoint.WEIGHTS).read_bytes())
    data[-3] ^= 1
    (place / checkpoint.WEIGHTS).write_bytes(data)
    with pytest.raises(UserError, match="does not match its checksum"):
        tuned.load(tmp_path / "run")


@pytest.mark.parametrize(
    "made",
    [transform.bit_eval(48), transform.xray_eval(32), transform.natural_eval(224, 256),
     transform.Transform("resize", 9, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), downscale="area")],
)  # fmt: skip
def test_a_transform_goes_by_way_of_json(made):
    fields = json.loads(json.dumps(transform.as_fields(made)))
    back = transform.from_fields(fields)
    sizes, draws = np.array([[300, 400], [20, 31]]), np.full((2, 40), 0.5)
    assert back == made
    np.testing.assert_array_equal(transform.windows(back, sizes, draws), transform.windows(made, sizes, draws))
