"""What a program asks of the file system, counted by strace: lookups of paths, and looks at open files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from loaders.errors import UserError

_CALL = re.compile(r'^\d+ +(\w+)\((?:(?:AT_FDCWD|\d+)<(?P<at>[^>]*)>, )?(?:"(?P<path>[^"]*)")?')


def why_not() -> str:
    """Why nothing can be counted here; empty where it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True)
    return "strace may not trace here" if tried.returncode else ""


def paths(
    words: Sequence[str | Path], until: str = "", *, folder: Path | None = None, env: Mapping[str, str] | None = None
) -> list[str]:
    """The path of each call of `words` and its children, in order, until they write `until` (empty: all).

    folder: where they run. UserError where they fail, or never write that.
    """
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "calls"
        trace = ["strace", "-f", "-y", "-qq", "--seccomp-bpf", "-e", "trace=%file,write", "-s", "4096", "-o", str(log)]
        done = subprocess.run(
            [*trace, *map(str, words)], cwd=folder, env=env, capture_output=True, encoding="utf-8", errors="replace"
        )
        if done.returncode:
            raise UserError(f"{' '.join(map(str, words))} ended with code {done.returncode}: {done.stderr[-2000:]}")
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for line in lines:
        call = _CALL.match(line)
        if call is None:
            continue
        if call[1] != "write":
            found.append(os.path.normpath(os.path.join(folder or "", call["at"] or "", call["path"] or "")))
        elif until and until in line:
            return found
    if until:
        raise UserError(f"{' '.join(map(str, words))} never wrote {until!r}, but: {done.stdout[-2000:]}")
    return found


def below(found: Sequence[str], folders: Sequence[Path]) -> int:
    """How many of the paths lie in one of the folders."""
    prefixes = tuple(f"{folder}/" for folder in folders)
    return sum(f"{path}/".startswith(prefixes) for path in found)
