import pytest

from engine import export
from tests.support import tuned_run


def test_the_command_writes_and_says_how_near(tmp_path, capsys):
    folder, _, _ = tuned_run.made(tmp_path / "run")
    capsys.readouterr()
    export.main([str(folder), str(tmp_path / "out"), "--torch"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("model.pt2: on 12 images at most ") and said[-1].startswith(f"{tmp_path / 'out'}: ")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.pt2", "README.md", "export.json"}


@pytest.mark.parametrize(
    ("words", "said"),
    [(["none", "out"], "does not exist"), (["run", "out", "--timm"], "--timm: timm has no network")],
)
def test_what_cannot_be_ends_with_one_message(tmp_path, capsys, monkeypatch, words, said):
    tuned_run.made(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        export.main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
