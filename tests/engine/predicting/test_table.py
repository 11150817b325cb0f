import csv
import json
import math

import numpy as np
import pandas as pd
import pytest

from engine.predicting import table
from engine.predicting.table import Predictions
from loaders.errors import UserError

NAMES = ("a", 'b, "c"', "d é")
ABOUT = {"runs": [{"path": "runs/x"}], "data": "test.h5"}


def one_of_many(labels=True):
    rng = np.random.default_rng(0)
    values = rng.dirichlet([0.01, 1, 1], 50)  # some next to 0
    known = rng.integers(-1, 3, 50) if labels else None
    return Predictions([f"k {i}, x" for i in range(50)], [""] * 25 + ["7"] * 25, NAMES, values, known, False)


def several(labels=True):
    rng = np.random.default_rng(1)
    known = rng.choice([0.0, 1.0, math.nan], (50, 3)) if labels else None
    return Predictions([str(i) for i in range(50)], [str(i % 9) for i in range(50)], NAMES, rng.random((50, 3)), known,
                       True)  # fmt: skip


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("make", [one_of_many, several])
def test_what_is_written_is_read(tmp_path, make, labels, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow", reason="Parquet is optional")
    before, path = make(labels), tmp_path / f"p.{ending}"
    table.write(path, before, ABOUT)
    after = table.read(path)
    assert (after.keys, after.groups, after.names, after.many) == (before.keys, before.groups, NAMES, before.many)
    assert after.probabilities.dtype == np.float64
    np.testing.assert_array_equal(after.probabilities, before.probabilities)
    assert (after.labels is None) == (before.labels is None)
    if labels:
        assert after.labels.dtype == before.labels.dtype
        np.testing.assert_array_equal(after.labels, before.labels)
    said = json.loads((tmp_path / f"p.{ending}.about.json").read_text())
    assert said["runs"] == ABOUT["runs"] and said["names"] == list(NAMES) and said["several_labels"] is before.many
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"p.{ending}", f"p.{ending}.about.json"]


@pytest.mark.parametrize("make", [one_of_many, several])
def test_pandas_reads_the_columns(tmp_path, make):
    predictions = make()
    table.write(tmp_path / "p.csv", predictions, {})
    frame = pd.read_csv(tmp_path / "p.csv", dtype={"key": str, "group": str}, keep_default_na=False, na_values={})
    assert frame["key"].tolist() == predictions.keys and frame["group"].tolist() == predictions.groups
    for column, name in enumerate(NAMES):
        np.testing.assert_array_equal(frame[f"p:{name}"], predictions.probabilities[:, column])
        if predictions.many:
            words = {0.0: "0", 1.0: "1"}
            expected = [words.get(value, "") for value in predictions.labels[:, column].tolist()]
            assert frame[f"label:{name}"].astype(str).tolist() == expected
    if not predictions.many:
        assert frame["label"].tolist() == ["" if n < 0 else NAMES[n] for n in predictions.labels]


def test_what_other_programs_write_is_read(tmp_path):
    """Columns in another order, and others among them; a byte order mark, line ends of Windows, two digits, no row."""
    text = "label,p:no ,age,p:yes,key\r\nyes,0.33,40,.66,1\r\n\r\n,1,,0,2\r\n"
    (tmp_path / "p.csv").write_bytes("\ufeff".encode() + text.encode())
    found = table.read(tmp_path / "p.csv")
    assert (found.keys, found.groups, found.names, found.many) == (["1", "2"], ["", ""], ("no", "yes"), False)
    np.testing.assert_array_equal(found.probabilities, [[0.33, 0.66], [1, 0]])
    assert found.labels.tolist() == [1, -1]


def test_labels_at_once_are_zero_one_or_unknown(tmp_path):
    (tmp_path / "p.csv").write_text(
        "key,p:a,p:b,label:b\n1,0,1,1\n2,.5,.5,0.0\n3,1,1,\n4,1,1,-1\n5,0,0,NaN\n6,0,0,1.0\n"
    )
    found = table.read(tmp_path / "p.csv")
    assert found.many
    np.testing.assert_array_equal(found.labels[:, 1], [1, 0, np.nan, np.nan, np.nan, 1])
    assert np.isnan(found.labels[:, 0]).all()


@pytest.mark.parametrize(
    ("rows", "said", "many"),
    [("1,.5,.5", None, False), ("1,.5,.6", None, True), ("1,.5,.5", True, True), ("1,.4999,.5", False, False)],
)
def test_without_labels_the_kind_is_what_is_said_or_what_the_sums_are(tmp_path, rows, said, many):
    (tmp_path / "p.csv").write_text(f"key,p:a,p:b\n{rows}\n")
    if said is not None:
        (tmp_path / "p.csv.about.json").write_text(json.dumps({"several_labels": said}))
    found = table.read(tmp_path / "p.csv")
    assert found.many is many and found.labels is None


HEAD = "key,group,p:a,p:b,label"
GOOD = "1,,.5,.5,a"
SEVERAL = "key,p:a,label:a"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no column key", "it has none"]),
        ("name,p:a\n1,0\n", ["no column key", "it has name, p:a"]),
        ("key,a\n1,0\n", ["no column p:NAME", "it has key, a"]),
        ("key,p:\n1,1\n", ["column p: without the name"]),
        ("key,p:a,p:a\n1,0,1\n", ["the column p:a twice"]),
        ("key,p:a,label,label:a\n1,1,a,1\n", ["both label", "label:a"]),
        ("key,p:a,label:b\n1,1,0\n", ["the column label:b but not p:b"]),
        (f"{HEAD}\n", ["has no rows"]),
        (f"{HEAD}\n{GOOD}\n2,,.5,.5\n", ["line 3", "4 values", "names 5"]),
        (f"{HEAD}\n{GOOD}\n,,.5,.5,a\n", ["line 3, column key", "empty"]),
        (f"{HEAD}\n{GOOD}\n{GOOD}\n", ["line 3, column key", "'1' is there twice", "line 2"]),
        (f"{HEAD}\n{GOOD}\n2,,x,.5,a\n", ["line 3, column p:a", "'x' is no number"]),
        (f"{HEAD}\n{GOOD}\n2,,1,,a\n", ["line 3, column p:b", "'' is no number"]),
        (f"{HEAD}\n{GOOD}\n2,,0_1,.5,a\n", ["line 3, column p:a", "'0_1' is no number"]),
        (f"{HEAD}\n{GOOD}\n2,,nan,.5,a\n", ["line 3, column p:a", "nan is no probability"]),
        (f"{HEAD}\n{GOOD}\n2,,1.5,-.5,a\n", ["line 3, column p:a", "1.5 is no probability"]),
        (f"{HEAD}\n{GOOD}\n2,,1,-.01,a\n", ["line 3, column p:b", "-0.01 is no probability"]),
        (f"{HEAD}\n{GOOD}\n2,,.9,.9,a\n", ["line 3", "add up to 1.8", "label:NAME"]),
        (f"{HEAD}\n{GOOD}\n2,,.5,.5,A\n", ["line 3, column label", "no class 'A'", "a, b"]),
        (f'{HEAD}\n{GOOD}\n"2\n2",,.5,.5,c\n', ["line 4, column label", "no class 'c'"]),
        (f"{SEVERAL}\n1,0,2\n", ["line 2, column label:a", "'2' is no label"]),
        (f"{SEVERAL}\n1,0,yes\n", ["line 2, column label:a", "'yes' is no label"]),
        (f"{SEVERAL}\n1,0,inf\n", ["line 2, column label:a", "'inf' is no label"]),
        (f'{HEAD}\n{GOOD}\n"2"x,,.5,.5,a\n', ["line 3", "no CSV"]),
        (f"{HEAD}\n{GOOD}\n{'x' * 200_000},,.5,.5,a\n", ["line 3", "no CSV"]),
    ],
)
def test_what_is_no_prediction_is_named_with_its_line_and_column(tmp_path, text, words):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(UserError) as refused:
        table.read(tmp_path / "p.csv")
    for word in [str(tmp_path / "p.csv"), *words]:
        assert word in str(refused.value)


@pytest.mark.parametrize("name", ["p.csv", "p.parquet"])
@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00k", b"PAR1\x00\x01", b"\x00" * 40])
def test_what_is_no_table_is_refused(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        table.read(tmp_path / name)


@pytest.mark.parametrize("content", ["[]", "{", "\udcff"])
def test_a_description_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "p.csv").write_text("key,p:a,p:b\n1,0,1\n")
    (tmp_path / "p.csv.about.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"about\.json"):
        table.read(tmp_path / "p.csv")


def test_what_breaks_off_leaves_the_file_before_as_it_was(tmp_path):
    path = tmp_path / "p.csv"
    table.write(path, one_of_many(), ABOUT)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    with (
        pytest.raises(KeyboardInterrupt),
        table.writing(path, NAMES, many=True, labelled=True, about={}) as add,
    ):
        add(several())
        raise KeyboardInterrupt
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


def test_it_is_written_in_parts(tmp_path):
    whole, about = several(), {}
    with table.writing(tmp_path / "p.csv", NAMES, many=True, labelled=True, about=about) as add:
        for part in (slice(0, 20), slice(20, 50)):
            add(Predictions(whole.keys[part], whole.groups[part], NAMES, whole.probabilities[part], whole.labels[part],
                            True))  # fmt: skip
        about["images"] = 50
    np.testing.assert_array_equal(table.read(tmp_path / "p.csv").probabilities, whole.probabilities)
    assert table.about_of(tmp_path / "p.csv")["images"] == 50
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.reader(file))) == 51
