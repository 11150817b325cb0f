import json

import pytest

from bench import pack_index
from bench.measured import pack_index as measured
from loaders.errors import UserError


def test_a_small_index_leaves_a_complete_record(tmp_path, capsys, monkeypatch):
    seconds = {False: iter([0.02, 0.03, 0.07]), True: iter([0.5, 0.5, 0.5])}

    def pretended(*words):
        if "--table" in words:
            return {"table_mib": 7.6}
        return {"open_s": next(seconds["--cold" in words]), "find_4096_s": 0.004, "open_mib": 3.4}

    monkeypatch.setattr(measured, "in_a_process", pretended)
    out = tmp_path / "new" / "index.json"
    words = ["--records", "3000", "--shards", "2", "--bytes", "16", "--repeats", "3", "--out", str(out)]
    assert pack_index.main(words) == 0
    assert "open, cold cache" in capsys.readouterr().out
    result = json.loads(out.read_text())
    medians = {name: times["median"] for name, times in result["milliseconds"].items()}
    shuffles = [medians.pop(f"shuffle an epoch, {how}") for how in ("full", "blocks")]
    assert medians == {"open, warm cache": 30.0, "open, cold cache": 500.0, "find 4,096 records": 4.0}
    assert all(0 < median < 10_000 for median in shuffles)
    assert {name: times["n"] for name, times in result["milliseconds"].items()} == dict.fromkeys(
        [*medians, "shuffle an epoch, full", "shuffle an epoch, blocks"], 3)  # fmt: skip
    assert (result["records"], result["shards"], result["supports"]) == (3000, 2, ["packing"])
    # Of a record: offset, checksum, label, height and width, in 8 + 4 + 8 + 2 x 4 bytes, and its key.
    assert result["index_bytes"] > 28 * 3000
    assert result["index_bytes_per_record"] == pytest.approx(result["index_bytes"] / 3000, abs=0.05)
    assert (result["open_mib"], result["table_mib"]) == (3, 8)


@pytest.mark.parametrize(
    ("word", "most"), [("--records", None), ("--shards", 99_999), ("--bytes", None), ("--repeats", None)]
)
def test_numbers_are_more_than_nothing(word, most):
    assert vars(pack_index.parser().parse_args([word, "1"]))[word.removeprefix("--")] == 1
    for value in [0, *([most + 1] if most else [])]:
        with pytest.raises(UserError, match=f"{word} is {value}"):
            pack_index.parser().parse_args([word, str(value)])
