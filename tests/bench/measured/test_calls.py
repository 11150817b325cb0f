"""What strace writes, read: the paths of calls, whole and relative, until something is written."""

import subprocess
from pathlib import Path

import pytest

from bench.measured import calls
from loaders.errors import UserError

LOG = r"""
11 openat(AT_FDCWD</run>, "a/../b.yaml", O_RDONLY|O_CLOEXEC) = 3</run/b.yaml>
11 newfstatat(4</data>, "train.h5", {st_mode=S_IFREG|0644, ...}, 0) = 0
11 stat("/env/lib/x.so", 0x7ffc) = -1 ENOENT (No such file or directory)
12 access("plain", R_OK) = 0
11 write(1</dev/pts/0>, "step 1/2  loss 3\n", 17) = 17
11 openat(AT_FDCWD</run>, "later", O_RDONLY) = 3
+++ exited with 0 +++
"""


@pytest.fixture
def traced(monkeypatch):
    """traced(code): strace as if it had ended with that code and left LOG."""

    def pretend(code=0):
        def run(words, **more):
            Path(words[words.index("-o") + 1]).write_text(LOG)
            return subprocess.CompletedProcess(words, code, "said", "why")

        monkeypatch.setattr(calls.subprocess, "run", run)

    return pretend


def test_paths_until_a_word_is_written(traced):
    traced()
    until = ["/run/b.yaml", "/data/train.h5", "/env/lib/x.so", "/run/plain"]
    assert calls.paths(["x"], "step 1/2", folder=Path("/run")) == until
    assert calls.paths(["x"], folder=Path("/run")) == [*until, "/run/later"]
    assert calls.paths(["x"])[3] == "plain"
    assert calls.below(until, [Path("/run"), Path("/env/lib")]) == 3
    assert calls.below(until, [Path("/run/b")]) == 0


def test_a_command_that_fails_or_never_says_the_word_is_named(traced):
    traced()
    with pytest.raises(UserError, match="x y never wrote 'step 9', but: said"):
        calls.paths(["x", "y"], "step 9")
    traced(3)
    with pytest.raises(UserError, match="x y ended with code 3: why"):
        calls.paths(["x", "y"])
