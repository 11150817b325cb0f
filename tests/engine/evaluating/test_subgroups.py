import numpy as np
import pytest

from engine.evaluating import subgroups
from engine.predicting.table import Predictions
from loaders.errors import UserError


@pytest.fixture
def split(tmp_path):
    """split(text, column, …): the subgroups that a table makes of six images of three patients."""
    keys = [f"set/{i}.png" for i in range(6)]
    images = Predictions(keys, ["p0", "p0", "p1", "p1", "p2", ""], ("a",), np.zeros((6, 1)), np.zeros((6, 1)), True)

    def read(text, column, bands=None):
        (tmp_path / "t.csv").write_text(text, encoding="utf-8")
        found = subgroups.read(tmp_path / "t.csv", column, images, bands)
        return {name: np.flatnonzero(rows).tolist() for name, rows in found.rows.items()}, found

    return read


def test_by_group_by_key_and_by_file_name(split):
    found, about = split("Patient ID,Sex\np0,F\np1,M\np2,F\np9,M\n", "Sex")
    assert found == {"F": [0, 1, 4], "M": [2, 3]}
    assert about.unknown == 1 and about.joined.endswith("= group (5 of 6 images)")
    found, about = split("view,key\nPA,set/0.png\nAP,set/3.png\n,set/4.png\n", "view")
    assert found == {"AP": [3], "PA": [0]} and about.unknown == 4
    found, about = split("Image Index,View\n0.png,PA\n1.png,AP\n5.png,AP\n", "View")
    assert found == {"AP": [1, 5], "PA": [0]} and "Image Index of" in about.joined and "= file name" in about.joined


def test_many_numbers_come_in_bands(split):
    rows = "".join(f"set/{i}.png,{age}\n" for i, age in enumerate(("019Y", "020Y", "59", "60", "006M", "81")))
    found, _ = split("key,age\n" + rows, "age", [20, 60])
    assert found == {"< 20": [0, 4], "20 to < 60": [1, 2], "60 or more": [3, 5]}
    more = "".join(f"other{i},{i}\n" for i in range(20))
    found, _ = split("key,age\n" + rows + more, "age")
    assert found == {"019Y": [0], "020Y": [1], "59": [2], "60": [3], "006M": [4], "81": [5]}  # six values are few


def test_numbers_are_bands_of_twenty_where_there_are_many(tmp_path):
    ages = [3, 19, 20, 39, 41, 45, 60, 79, 80, 99]
    images = Predictions([str(i) for i in range(10)], [""] * 10, ("a",), np.zeros((10, 1)), np.zeros((10, 1)), True)
    (tmp_path / "t.csv").write_text("key,age\n" + "".join(f"{i},{age}\n" for i, age in enumerate(ages)))
    found = subgroups.read(tmp_path / "t.csv", "age", images).rows
    assert {name: rows.sum() for name, rows in found.items()} == {
        "< 20": 2, "20 to < 40": 2, "40 to < 60": 2, "60 to < 80": 2, "80 or more": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "column", "bands", "message"),
    [
        ("key,sex\nset/0.png,F\n", "gender", None, "there is no column of .* 'gender'"),
        ("key,sex\nset/0.png,F\n", "sex", None, "the column sex has F, which makes no two subgroups"),
        ("key,sex\nset/0.png,\n", "sex", None, "the column sex has no value"),
        ("key,sex\nz.png,F\n", "sex", None, "no column .key. holds keys, file names or groups .* such as 'set/0.png'"),
        ("sex\nF\n", "sex", None, "besides that one there is none"),
        ("id,sex\np0,F\np0,M\n", "sex", None, "id p0 has the sex 'F' in one row and 'M' in another"),
        ("key,sex\nset/0.png,F\nset/1.png,M\n", "sex", [40], "--bands: the column sex holds 'F', which is no number"),
        ("", "sex", None, "has no rows"),
        ("key,id\n" + "".join(f"set/{i}.png,x{i}\n" for i in range(6)) , "id", None, None),
        ('key,sex\n"set/0', "sex", None, "is damaged, or not a CSV"),
    ],
)  # fmt: skip
def test_tables_that_make_no_subgroups(split, text, column, bands, message):
    if message is None:
        assert len(split(text, column, bands)[0]) == 6
        return
    with pytest.raises(UserError, match=message):
        split(text, column, bands)


def test_a_column_of_names_makes_no_subgroups(tmp_path):
    images = Predictions([str(i) for i in range(60)], [""] * 60, ("a",), np.zeros((60, 1)), np.zeros((60, 1)), True)
    (tmp_path / "t.csv").write_text("key,name\n" + "".join(f"{i},n{i}\n" for i in range(60)))
    with pytest.raises(UserError, match="has 60 values .*: too many for subgroups"):
        subgroups.read(tmp_path / "t.csv", "name", images)
