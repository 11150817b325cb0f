"""Commands print on terminals of any encoding, into pipes that close, and onto full disks."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config.loading import load
from engine.config.schema import PretrainConfig
from loaders.output import PLAIN
from tests.support.interface import COMMANDS

ROOT = Path(__file__).parents[2]
POORER = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1:strict"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0"},
}
ENDS = [("exit(3)", 3, ""), ("exit('why')", 1, "why\n"), ("exit()", 0, ""), ("7", 7, ""), ("None", 0, "")]


def run(words, place=None, **env):
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=os.environ | env, stdout=place or subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr.decode()


def printing(text, main="None"):
    """A command that prints a text, as words of Python."""
    return ["-c", f"from loaders.output import as_command\nas_command(lambda: print({text!a}) or {main})"]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_is_printed_where_there_is_only_ascii(command):
    code, said, error = run(["-m", *command, "--help"], **POORER["C"])
    assert (code, error) == (0, "") and said.isascii() and b"usage:" in said


@pytest.mark.parametrize("poorer", POORER)
def test_what_an_encoding_lacks_is_spelled_with_what_it_has(poorer):
    code, said, error = run(printing("3 ± 1 → ä 漢 caf\udce9"), **POORER[poorer])
    kept = {"latin-1": "3 ± 1 -> ä \\u6f22 caf\\udce9\n".encode("latin-1")}
    assert (code, error) == (0, "")
    assert said == kept.get(poorer, b"3 +- 1 -> \\xe4 \\u6f22 caf\\udce9\n")


def test_names_that_are_no_text_are_printed_in_utf_8_too():
    assert run(printing("→ caf\udce9"), PYTHONIOENCODING="utf-8:strict") == (0, "→ caf\\udce9\n".encode(), "")


def texts(tree):
    """The texts in a module that are not its documentation."""
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


def test_every_sign_in_our_messages_has_a_spelling_in_ascii():
    """Letters, as of names, have their numbers."""
    files = [path for room in ("engine", "loaders", "bench", "jobs") for path in (ROOT / room).rglob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files if path.name != "output.py"]
    used = {sign for tree in trees for text in texts(tree) for sign in text if ord(sign) > 127 and not sign.isalpha()}
    used = {sign for sign in used if not "\ud800" <= sign <= "\udfff"}  # halves of signs: bytes in names, not printed
    assert used == set(PLAIN)
    assert all(plain.isascii() for plain in PLAIN.values())


def test_a_file_name_that_the_locale_cannot_spell_is_said():
    code, _, error = run(printing("", "open('/none/\\xe4')"), **POORER["C"])
    assert code == 2 and "LC_ALL=C.UTF-8" in error
    assert error.startswith("error: '/none/\\xe4' cannot be the name of a file")


@pytest.mark.parametrize(("poorer", "name"), [("ascii", "ä/→.h5"), ("latin-1", "ä/→.h5"), ("latin-1", "ä.h5")])
def test_a_printed_configuration_is_read_back_whatever_the_terminal(poorer, name, tmp_path):
    words = ["-m", "engine.pretrain", "demo", f"data.train={name}", "about=1e5 #ä", "--print-config"]
    code, said, error = run(words, **POORER[poorer])
    assert (code, error) == (0, "")
    (tmp_path / "mine.yaml").write_bytes(said)
    config = load(PretrainConfig, str(tmp_path / "mine.yaml"), [], "pretrain")
    assert (config.data.train, config.about) == (name, "1e5 #ä")


@pytest.mark.parametrize("words", [["-m", "engine.finetune", "--list"], printing("text")], ids=["command", "print"])
def test_a_full_disk_is_said_once(words):
    with open("/dev/full", "wb") as full:
        code, _, error = run(words, full)
    assert code == 2 and error.startswith("error: ") and "No space left" in error and error.count("\n") == 1


@pytest.mark.parametrize("text", ["short", "long " * 20_000], ids=["short", "long"])
def test_a_reader_that_leaves_ends_it_without_a_word(text):
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as unread:
        assert run(printing(text), unread)[::2] == (141, "")


RESULTS = str(ROOT / "docs" / "results" / "transfer" / "results.jsonl")


@pytest.mark.parametrize(
    "words",
    [
        ["bench.scaling", "--model-only"],
        ["bench.report", "tables", RESULTS],
        ["engine.report", RESULTS],
        ["engine.pretrain", "--list"],
        ["engine.pretrain", "demo", "data.train=x.h5", "--print-config"],
    ],
    ids=" ".join,
)
def test_no_command_speaks_of_a_reader_that_left(words):
    """Unbuffered, so that the first line that it prints finds nobody."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as unread:
        assert run(["-m", *words], unread, PYTHONUNBUFFERED="1")[::2] == (141, "")


def test_another_broken_pipe_is_a_defect_with_its_traceback():
    code, _, error = run(printing("", "(_ for _ in ()).throw(BrokenPipeError)"))
    assert code == 1 and "BrokenPipeError" in error


def test_output_that_a_parent_closed_leads_nowhere(tmp_path):
    """Otherwise the next file that is opened would have the number of stdout, and get what is printed."""
    file = tmp_path / "data"
    words = printing("", f"[open({str(file)!r}, 'wb'), __import__('os').write(1, b'lost')] and print('lost')")
    done = subprocess.run(["bash", "-c", '"$@" >&-', "-", sys.executable, *words], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr, file.read_bytes()) == (0, b"", b"")


@pytest.mark.parametrize(("ends", "code", "said"), ENDS)
def test_the_exit_code_is_that_of_the_command(ends, code, said):
    assert run(printing("", ends))[::2] == (code, said)
