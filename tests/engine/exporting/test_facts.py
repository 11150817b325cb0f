import json

import pytest

from engine.exporting import facts
from engine.predicting import tuned
from loaders.errors import UserError
from loaders.pipelines import transform
from tests.support import tuned_run


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "damaged"), ("[]", "damaged"), ("{}", "it has no 'temperature'"), ('{"temperature": 0}', "above 0"),
     ('{"temperature": -1}', "above 0"), ('{"temperature": true}', "above 0"), ('{"temperature": "2"}', "above 0"),
     ('{"temperature": Infinity}', "above 0"), ('{"temperature": NaN}', "above 0"), ("\xff", "damaged"),
     ('{"temperature": 2, "weights": "other"}', "other weights"), ('{"predictions": []}', "damaged"),
     ('{"predictions": [{"temperature": 1}, {"temperature": 2}]}', "damaged"),
     ('{"predictions": [{"file": "test"}]}', "it has no 'temperature'")],
)  # fmt: skip
def test_a_calibration_that_cannot_be_is_refused(tmp_path, text, said):
    (tmp_path / "temperature.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=said):
        facts.temperature(tmp_path / "temperature.json", "these")


def test_a_calibration_is_of_the_weights_that_it_was_fitted_to(tmp_path):
    for more in ({}, {"weights": "these"}):
        (tmp_path / "temperature.json").write_text(json.dumps({"temperature": 2} | more))
        assert facts.temperature(tmp_path / "temperature.json", "these") == 2.0


def test_a_calibration_that_is_named_is_taken_before_that_of_the_folder(tmp_path):
    """As engine.evaluate writes it of one file of predictions."""
    folder, _, _ = tuned_run.made(tmp_path / "run")
    known = tuned.load(folder)
    assert facts.of(known).temperature is None
    (folder / "temperature.json").write_text('{"temperature": 2}')
    (tmp_path / "about.json").write_text('{"seed": 0, "predictions": [{"file": "test", "temperature": 1.5}]}')
    assert facts.of(known).temperature == 2.0
    assert facts.of(known, tmp_path / "about.json").temperature == 1.5
    with pytest.raises(UserError, match="none.json cannot be read"):
        facts.of(known, tmp_path / "none.json")


@pytest.mark.parametrize(
    ("preset", "words"),
    [(transform.natural_eval(224), ["short side resized to 256", "centre of 224 x 224"]),
     (transform.bit_eval(128), ["resized to 128 x 128", "whatever its aspect"]),
     (transform.xray_eval(224), ["turned to gray", "centre square resized to 224 x 224"])],
)  # fmt: skip
def test_what_travels_says_how_images_are_prepared(tmp_path, preset, words):
    folder, _, _ = tuned_run.made(tmp_path / "run", transform=preset)
    found = facts.of(tuned.load(folder)).metadata()
    assert all(word in found["preprocessing"] for word in words)
    assert transform.from_fields(json.loads(found["transform"])) == preset
    assert json.loads(found["classes"]) == ["bird", "cat", "dog"]
    assert all(isinstance(value, str) for value in found.values())
