import json
import re

import pytest

from engine import evaluate, finetune
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.config.loading import load
from engine.config.schema import FinetuneConfig
from engine.predicting.table import read, write
from loaders.errors import UserError
from tests.support.predictions import classes, labels


@pytest.fixture
def given(tmp_path):
    """given(NAME): a file of predictions of several labels; of other images with val in its name."""

    def save(name):
        write(tmp_path / name, labels(sum(name.encode()), truth_of="val" in name), {})
        return str(tmp_path / name)

    return save


def test_a_table_is_printed_and_all_is_written(given, tmp_path, capsys):
    words = ["--threshold", "0.4", "--resamples", "100", "--out", str(tmp_path / "new" / "out"), "--figures", "svg"]
    evaluate.main([given("a.csv"), *words])
    said = capsys.readouterr().out
    assert "| effusion |" in said and "| largest class alone |" in said and "roc.svg" in said
    written = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert {"scores.md", "scores.csv", "about.json", "roc.svg", "reliability.svg"} <= written
    assert json.loads((tmp_path / "new" / "out" / "about.json").read_text())["resamples"] == 100


def test_equal_seeds_print_the_same(given, capsys):
    file, said = given("a.csv"), []
    for seed in (0, 0, 1):
        evaluate.main([file, "--resamples", "100", "--seed", str(seed)])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2].replace("seed 1", "seed 0")


def test_parquet_is_read_as_well(tmp_path, capsys):
    pytest.importorskip("pyarrow", reason="pyarrow, which reads Parquet, is not installed")
    write(tmp_path / "c.parquet", classes(), {})
    evaluate.main([str(tmp_path / "c.parquet"), "--resamples", "100"])
    assert "| all classes |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sensitivity", "0.9"], "--threshold-from FILE says on which"),
        (["--threshold", "0.5", "--threshold-from", "val.csv"], "name one of the two"),
        (["--by", "sex"], "--by COLUMN and --table CSV belong together"),
        (["--table", "t.csv"], "--by COLUMN and --table CSV belong together"),
        (["--bands", "40"], "--bands splits the column of --by"),
        (["--threshold", "1.5"], "--threshold is 1.5; expected a number, 0.0 to 1.0"),
        (["--resamples", "0"], "--resamples is 0"),
    ],
)
def test_words_that_do_not_go_together(given, words, message):
    with pytest.raises(UserError, match=message):
        evaluate.main([given("a.csv"), *words])


@pytest.mark.parametrize("text", ["", "a", "40,20", "20,20", "nan", "1,inf"])
def test_bands_are_rising_numbers(given, text, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([given("a.csv"), "--by", "age", "--table", "t.csv", "--bands", text])
    assert "expected rising numbers between commas" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.csv"], "gone.csv cannot be read: No such file or directory"),
        (["a.csv", "--threshold-from", "a.csv"], "are scored too, in"),
        (["a.csv", "b.csv", "--calibrate", "val.csv"], "--calibrate names 1 for 2 files"),
        (["a.csv", "val.csv"], "lacks images that"),
        (["a.csv", "--by", "sex", "--table", "gone.csv"], "gone.csv cannot be read"),
        (["a.csv", "--out", "a.csv"], "--out .*a.csv cannot be written"),
    ],
)
def test_files_that_cannot_be_evaluated_end_with_one_line(given, tmp_path, monkeypatch, words, message, capsys):
    for name in ("a.csv", "b.csv", "val.csv"):
        given(name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        evaluate.main([*words, "--resamples", "100"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error)


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A run of five classes, and its result line."""
    place = tmp_path_factory.mktemp("runs") / "a"
    words = [f"data.train={digits / 'high-train.h5'}", f"data.test={digits / 'high-test.h5'}", "model=R8x0.25-8px",
             "rule.steps=20", "from=random", f"folder={place}", f"results={place}.jsonl"]  # fmt: skip
    config = load(FinetuneConfig, "demo", words, "finetune")
    return place, finetune.finetune(config, Communicator(Launch("alone")), quiet=True)


def test_a_run_predicts_first(run, digits, tmp_path, monkeypatch, capsys):
    place, line = run
    monkeypatch.chdir(tmp_path)
    for out in (["--out", "out"], []):
        with pytest.raises(SystemExit) as ended:
            evaluate.main([str(place), str(digits / "high-test.h5"), "--resamples", "100", *out])
        assert ended.value.code == 0
        found = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| all classes")][0]
        assert f" {line['metric_value'] / 100:.3f} (" in found and f"| {line['majority'] / 100:.3f} |" in found
    assert read("out/predictions.csv").keys == read("high-test-predictions.csv").keys
    assert (tmp_path / "out" / "scores.csv").exists() and not (tmp_path / "scores.csv").exists()


def test_a_run_alone_is_refused(run, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate.main([str(run[0])])
    assert ended.value.code == 2
    assert "is a folder; expected files of predictions, or runs and what they predict on" in capsys.readouterr().err
