import pytest

from engine.exporting import card, facts
from engine.predicting import tuned
from tests.support import tuned_run


def written(tmp_path, **more):
    folder, _, _ = tuned_run.made(tmp_path / "run", **more)
    found = tuned.load(folder)
    return card.text(found, facts.of(found), ["onnx"], {"onnx": "on 12 images …"})


def test_a_card_has_data_protocol_scores_with_intervals_and_commit(tmp_path):
    text = written(tmp_path, result=tuned_run.RESULT)
    for part in ("# cifar10 → chest", "| trained on | chest-train.h5 |", "| images trained on | 30 |", "| shots | 10 |",
                 "| seed | 3 |", "top-1 61.50%, 95% interval 54.80 to 67.90, over 224 images",
                 "most frequent class has a top-1 of 44.64%", "| cat | 71.25% |", "| dog | unknown |",
                 "| commit of the code that trained | 69f6460+ |", "| weights that it starts from | runs/cifar10 |",
                 "| classes with too few images | dog |", "on 12 images …", "model.onnx"):  # fmt: skip
        assert part in text, part
    assert "model.pt2" not in text and "local-dir" not in text


def test_a_card_says_what_it_must_not_be_used_for(tmp_path):
    text = written(tmp_path, result=tuned_run.RESULT)
    section = text.split("## What it must not be used for")[1].split("\n## ")[0]
    for part in ("not a medical device", "other scanners", "Classes that are not listed", "not calibrated"):
        assert part in section, part
    assert "before it is scored" not in section
    assert "before it is scored" in written(tmp_path / "other")


def test_a_calibrated_network_is_not_said_to_be_none(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "temperature.json").write_text('{"temperature": 1.75}')
    text = written(tmp_path)
    assert "calibrated: logits divided by 1.75" in text and "not calibrated" not in text


@pytest.mark.parametrize("name", ["a|b", "a\nb", "<b>", "x*y*z"])
def test_names_do_not_break_the_table(tmp_path, name):
    result = tuned_run.RESULT | {"classes": {name: 1.0}, "dataset": name}
    lines = written(tmp_path, result=result, names=(name, "cat")).splitlines()
    (row,) = [line for line in lines if line.endswith(" | 1.00% |")]
    assert row.replace("\\|", "").count("|") == 3
    assert all(line.startswith("|") == line.endswith("|") for line in lines)
