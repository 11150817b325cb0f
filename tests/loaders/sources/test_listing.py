import pytest

from loaders.sources.listing import Bytes, FileRange, Item


def test_a_part_of_a_file_is_read_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    assert FileRange(str(path)).read() == b"0123456789"
    assert FileRange(str(path), 3).read() == b"3456789"
    assert FileRange(str(path), 3, 7).read() == b"3456789"
    assert FileRange(str(path), 3, 0).read() == b""
    with pytest.raises(OSError, match="ends 2 bytes too early"):
        FileRange(str(path), 3, 9).read()


def test_who_names_no_group_has_none():
    assert Item("a", Bytes(b""), 0).group == -1
