import json
import sys
from pathlib import Path

import pytest

from bench import startup
from bench.measured import calls
from loaders.errors import UserError


@pytest.fixture
def pretended(monkeypatch):
    """Nothing is packed, unpacked or traced: commands as they were given, and a rank that opens three files."""
    given = []
    monkeypatch.setattr(calls, "why_not", lambda: None)
    monkeypatch.setattr(sys, "base_prefix", "/usr/of-all")
    monkeypatch.setattr(startup, "_rank", lambda venv, tree, pack, shared, backend: [
        str(tree / "engine/cli.py"), "/usr/of-all/lib/python", "/dev/null"])  # fmt: skip

    def milliseconds(words, env=None):
        given.append([str(word) for word in words])
        if words[1] == "pack":
            for size, path in enumerate(words[2:], 5):
                Path(path).write_bytes(bytes(size))
        return 100.0 * len(given)

    monkeypatch.setattr(startup, "_milliseconds", milliseconds)
    return given


def test_calls_and_times_are_recorded(pretended, tmp_path, capsys):
    out, stage = tmp_path / "new" / "startup.json", tmp_path / "node"
    stage.mkdir()
    words = [str(tmp_path / "data" / "p.h5"), "--stage", str(stage), "--turns", "3", "--backends", "host"]
    assert startup.main([*words, "--out", str(out)]) == 0
    assert [words[1] for words in pretended] == ["pack", "unpack", "unpack", "unpack"]
    result = json.loads(out.read_text())
    assert result["bytes"] == {"env": 5, "tree": 6}
    assert result["calls_until_the_first_step"] == {
        "host, shared": {"calls": 3, "to_shared": 2},
        "host, staged": {"calls": 3, "to_shared": 1},
    }
    assert result["milliseconds"]["pack"]["median"] == 100
    assert (result["milliseconds"]["unpack"]["median"], result["milliseconds"]["unpack"]["n"]) == (300, 3)
    assert '"to_shared": 1' in capsys.readouterr().out


def test_where_nothing_can_be_counted_it_says_why(pretended, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(calls, "why_not", lambda: "strace is not installed")
    assert startup.main([str(tmp_path / "p.h5"), "--stage", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: strace is not installed: nothing can be counted\n"
    assert not pretended


def test_a_command_is_timed_in_milliseconds_and_one_that_fails_is_named(monkeypatch):
    clock = iter([1.0, 1.25, 2.0])
    monkeypatch.setattr(startup.time, "perf_counter", lambda: next(clock))
    assert startup._milliseconds(["true"]) == 250.0
    with pytest.raises(UserError, match="^sh ended with code 3: gone$"):
        startup._milliseconds(["sh", "-c", "echo $WHAT >&2; exit 3"], {"WHAT": "gone"})
