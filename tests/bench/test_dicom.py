import json

import pytest

from bench import dicom
from bench.peers import dicom as peer
from loaders.errors import UserError


@pytest.mark.parametrize("syntax", ["explicit", "jpeg2000"])
def test_a_small_run_leaves_a_complete_record(tmp_path, capsys, syntax):
    words = ["--images", "3", "--side", "96", "--workers", "1", "--turns", "2", "--syntax", syntax]
    assert dicom.main([*words, "--json", str(tmp_path / "new/a.json")]) == 0
    found = json.loads((tmp_path / "new/a.json").read_text())
    assert found["supports"] == ["packing"] and found["n"] == 2 and found["workers"] == 1
    assert {"commit", "hardware", "versions", "spread"} <= found.keys()
    ours, theirs = (found["images_per_second"][name] for name in (dicom.OURS, dicom.PEER))
    ratio = found["pack_relative_to_loop"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"] and ratio["n"] == 2
    assert ours["low"] / theirs["high"] <= ratio["low"] and ratio["high"] <= ours["high"] / theirs["low"]
    assert f"is {ratio['median']:.2f} (" in capsys.readouterr().out
    assert found["milliseconds"][dicom.OURS]["best"] == pytest.approx(1000 / ours["high"])


def test_another_image_than_the_loop_makes_is_found(monkeypatch):
    monkeypatch.setattr(peer.pixels, "apply_voi_lut", lambda values, data: values / 2)
    with pytest.raises(AssertionError, match="another image than pydicom's"):
        dicom.main(["--images", "1", "--side", "96", "--workers", "1", "--turns", "1"])


@pytest.mark.parametrize("word", ["--images", "--side", "--workers", "--turns"])
def test_numbers_are_more_than_nothing(word):
    with pytest.raises(UserError, match=f"{word} is 0"):
        dicom.parser().parse_args([word, "0"])
