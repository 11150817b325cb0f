"""Whatever is damaged in a file of others, its reader says a UserError, or reads it."""

import pytest

from loaders.errors import SystemRefusal, UserError, reading
from tests.fuzz.readers import READERS, fuzz, read_by, tar_of


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_end_in_a_message(name, tmp_path, capsys):
    fuzz(name, 200, tmp_path)


NESTED = b"[" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "refused"),
    [
        ("a recipe", b"name: " + NESTED[:3000], True),
        ("a word", b"data.train=" + NESTED[:3000] + b"'a']", True),
        ("a sweep", b"name: " + NESTED[:3000], True),
        ("metrics", NESTED + b"\n", False),  # a line that is passed over
        ("results", NESTED + b"\n", True),
        ("results of a sweep", NESTED + b"\n", True),
        ("WebDataset", tar_of({"1.png": b"", "1.json": NESTED}), True),
        ("about.json", NESTED, True),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_nested_too_deeply_is_told(tmp_path, name, content, refused):
    file, _, read, *_ = READERS[name]
    (tmp_path / file).write_bytes(content)
    assert read_by(read, tmp_path / file) == refused


@pytest.mark.parametrize("error", [ValueError("x\ny"), KeyError("x"), RecursionError("x"), MemoryError()])
def test_what_a_parser_raises_names_file_and_reason(error):
    said = r"a\.bin, line 3 is damaged, or not a table \((x|it has no 'x'|MemoryError)\); get it"
    with pytest.raises(UserError, match=said), reading("a.bin, line 3", "a table", "get it again"):
        raise error


def test_what_the_system_refuses_is_not_called_damage():
    with pytest.raises(SystemRefusal, match="a.bin cannot be read: Input/output error"), reading("a.bin", "a table"):
        raise OSError(5, "Input/output error")


def test_what_a_reader_said_itself_passes():
    with pytest.raises(UserError, match="^its own words$"), reading("a.bin", "a table"):
        raise UserError("its own words")
