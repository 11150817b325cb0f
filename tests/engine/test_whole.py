"""Files that appear whole or not at all."""

import json
import os

import pytest

from engine.whole import write_json
from loaders.errors import UserError


def test_json_appears_whole_in_a_folder_that_is_made(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"x": [1, float("nan")]})
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": [1, None]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a" / "b.json", {"x": object()})
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": [1, None]}
    assert [each.name for each in (tmp_path / "a").iterdir()] == ["b.json"]


@pytest.mark.parametrize("what", ["pipe", "folder"])
def test_what_is_no_file_is_not_replaced(tmp_path, what):
    place = tmp_path / "link"
    (os.mkfifo if what == "pipe" else os.mkdir)(tmp_path / what)
    place.symlink_to(tmp_path / what)
    with pytest.raises(UserError, match="is no file"):
        write_json(place, {})
    assert place.is_symlink()
