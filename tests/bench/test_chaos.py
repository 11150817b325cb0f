import json

import pytest

from bench import chaos
from bench.disturbed import supervised
from loaders.errors import UserError


def test_a_run_that_is_disturbed_ends_as_one_that_is_not(tmp_path, monkeypatch, digits, capsys):
    """A few disturbances, each for real: a rank killed, all asked to stop, all killed and a checkpoint damaged."""
    monkeypatch.setattr(chaos, "_pack", lambda place: digits / "low-train.h5")
    words = ["--steps", "160", "--save-every", "20", "--mean-seconds", "0.5", "--most", "3", "--seed", "1",
             "--turns", "2", "--kinds", "kill_rank,usr1,damage", "--json", str(tmp_path / "chaos.json")]  # fmt: skip
    assert chaos.main(words) == 0
    found = json.loads((tmp_path / "chaos.json").read_text())
    assert found["identical"] is True
    assert found["disturbances"] == {"kill_rank": 1, "usr1": 1, "damage": 1}
    assert found["starts"]["undisturbed"] == 2  # one a turn
    assert 3 <= found["starts"]["disturbed"] <= 5  # one may come while another ends the run
    for name in chaos.NAMES:
        (first, second) = (turn[name] for turn in found["turns"])
        assert 80 <= first["steps"] < second["steps"] == 160
        assert first["seconds"] + second["seconds"] == pytest.approx(found["milliseconds"][name]["median"] / 1e3)
    assert [one["kind"] for one in found["done"]] and len(found["done"]) == 3
    assert len(found["back_after_s"]) <= 3 and all(seconds > 0 for seconds in found["back_after_s"])
    speeds = found["images_per_second"]
    assert found["goodput_percent"] == pytest.approx(100 * speeds["disturbed"] / speeds["undisturbed"])
    assert {"commit", "hardware", "versions", "n", "spread"} <= found.keys() and found["supports"] == ["reliability"]
    assert "goodput_percent" in capsys.readouterr().out


def test_the_disk_is_left_out_where_none_can_be_filled(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no mount
    with chaos._small_disk(tmp_path / "small", True) as (place, reason):
        assert place.is_dir() and reason.startswith("no mount: No such file")
    with chaos._small_disk(tmp_path / "small", False) as (place, reason):
        assert reason == ""


def test_a_run_that_is_given_up_says_what_it_said(tmp_path):
    with pytest.raises(UserError, match="given up with code 2:(.|\\n)*there is no pack at"):
        command = chaos._command(tmp_path / "absent.h5", tmp_path / "run", 10, 5, 5.0)
        supervised.Run("quiet", command, tmp_path / "run", 10, 64).go_on(10, tmp_path / "run.log")


def test_a_disturbance_that_there_is_not_is_told():
    with pytest.raises(UserError, match="no disturbance 'flood'; there are: kill_rank"):
        chaos.main(["--kinds", "kill_rank,flood"])
