"""One process at a time in one place: a lock that is a file, on file systems that many hosts share too.

The file appears whole (a link to one that is written before), says who holds the place, and is touched again and again
while the holder lives. A holder that was killed leaves it behind: on the same host its process is looked for, of
another host's the file is watched for a while. A file that is there is replaced or removed by whoever has its turn
only: a second such file, named after what the first one says, so that nobody takes away what he has not read.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loaders.errors import UserError

BEAT_S = 10.0
"""Between two touches of the file."""
SILENT_S = 45.0
"""A file of another host that is not touched for so long is left over."""


_NEW = ".new"  # a file that is written, and not at its place yet


class InUse(UserError):
    """Somebody else is at work in the place."""


class Lock:
    """A place that this process holds from `take()` to `release()`, or finds somebody else in.

    path: of the file; what: the place, and advice: what else to do, for the message.
    """

    def __init__(self, path: Path, what: str, advice: str) -> None:
        self._path, self._what, self._advice = path, what, advice
        self._mine = b""
        self._released = threading.Event()
        self._seen: dict[Path, tuple[Any, float, float]] = {}  # others' files: as they are, since when, last look

    def take(self, wait: bool = True) -> None:
        """Hold the place. InUse where somebody else does.

        wait: stay until it is known whether one of another host lives; else he counts as living, until a later call.
        UserError where no file can be made.
        """
        said = False
        while True:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._mine = json.dumps(_me()).encode()
                taken, holder, lives = self._taken(self._path)
            except FileNotFoundError:  # it was just released
                if self._path.is_symlink():
                    raise UserError(f"{self._what} cannot be locked: {self._path} is a link to nothing") from None
                continue
            except OSError as error:
                raise UserError(f"{self._what} cannot be locked: {self._path}: {error.strerror}") from error
            if taken:
                self._released = threading.Event()
                threading.Thread(target=self._touch, args=(self._released,), daemon=True, name="lock").start()
                _sweep(self._path)
                return
            if lives is False:
                continue
            if lives or not wait:
                raise InUse(f"{self._what} is in use {_described(holder)}; {self._advice}")
            if not said:
                print(f"{self._path} is {_described(holder)}: watched {SILENT_S:.0f} s for a sign of life",
                      file=sys.stderr, flush=True)  # fmt: skip
                said = True
            time.sleep(min(1.0, SILENT_S / 10))

    def _taken(self, path: Path) -> tuple[bool, bytes, bool | None]:
        """Whether the file at `path` is this process's now; else what it says, and whether its holder lives.

        He who has the turn to take it counts as its holder. None: not to be known yet; False: it is another one now.
        """
        if _appeared(path, self._mine):
            return True, self._mine, True
        holder, touched = _read(path)
        alive, patient = _alive(holder), self._watched(path, (holder, touched))
        if alive or patient < 0:
            return False, holder, True
        if alive is None and patient <= SILENT_S:
            return False, holder, None
        turn = _turn(path, holder)
        mine, other, alive = self._taken(turn)  # of one who was killed in his turn, the turn is taken in the same way
        if not mine:
            return False, other, alive
        try:
            if _read(path)[0] != holder:
                return False, holder, False
            _replace(path, self._mine)
            return True, self._mine, True
        finally:
            _leave(turn, self._mine)

    def _watched(self, path: Path, now: Any) -> float:
        """Seconds for which a file has stayed as it is; negative where it has just changed: its holder lives."""
        moment = time.monotonic()
        seen, since, looked = self._seen.get(path, (None, moment, moment))
        if now == seen:
            self._seen[path] = (now, since, moment)
            return moment - since
        self._seen[path] = (now, moment, moment)
        return -1.0 if seen is not None and moment - looked < SILENT_S else 0.0

    def _touch(self, released: threading.Event) -> None:
        while not released.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a file system that is away for a while
                if not self.lost():
                    os.utime(self._path)

    def lost(self) -> bool:
        """Whether somebody else has taken the place, because this process gave no sign of life for long."""
        try:
            return _read(self._path)[0] != self._mine
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Leave the place."""
        self._released.set()
        turn = _turn(self._path, self._mine)
        with contextlib.suppress(OSError):  # what stays is recognised as left over
            if _appeared(turn, self._mine):  # else another host takes this process for gone, and its place
                _leave(self._path, self._mine)
                _leave(turn, self._mine)


@contextlib.contextmanager
def held(path: Path, what: str, advice: str) -> Iterator[Lock]:
    """Around work in a place that one process at a time may be in. InUse and UserError as of `Lock.take`."""
    lock = Lock(path, what, advice)
    lock.take()
    try:
        yield lock
    finally:
        lock.release()


def _appeared(path: Path, content: bytes) -> bool:
    """Whether a file could be made where there was none. Others see all of it, or nothing."""
    with _written(path, content) as whole:
        try:
            os.link(whole, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            return _begun(path, content)
    return True


def _begun(path: Path, content: bytes) -> bool:
    """As `_appeared` on a file system without links: others may see a part, of which nobody knows whether it lives."""
    try:
        with open(path, "xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _replace(path: Path, content: bytes) -> None:
    with _written(path, content) as whole:
        os.replace(whole, path)


@contextlib.contextmanager
def _written(path: Path, content: bytes) -> Iterator[Path]:
    """A file of one's own beside `path`, for the time of a block."""
    whole = path.with_name(f"{path.name}.{uuid.uuid4().hex}{_NEW}")
    try:
        with open(whole, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield whole
    finally:
        whole.unlink(missing_ok=True)


def _leave(path: Path, mine: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        if _read(path)[0] == mine:
            path.unlink()


def _sweep(path: Path) -> None:
    """Remove what processes of this host that were killed had written but not linked yet."""
    for each in path.parent.glob(f"{glob.escape(path.name)}.*{_NEW}"):
        with contextlib.suppress(OSError):
            if _alive(_read(each)[0]) is False:
                each.unlink()


def _turn(path: Path, holder: bytes) -> Path:
    return path.with_name(f"{path.name}.{hashlib.sha256(holder).hexdigest()[:16]}")


def _read(path: Path) -> tuple[bytes, int]:
    """What a lock file says, and when it was touched: of one that is opened, network file systems ask the server."""
    with open(path, "rb") as file:
        return file.read(), os.fstat(file.fileno()).st_mtime_ns


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip(),
        "space": os.readlink("/proc/self/ns/pid"),  # containers of one host number their processes anew
        "pid": os.getpid(),
        "started": start_of(os.getpid()),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "one": uuid.uuid4().hex,
    }


def start_of(pid: int) -> int | None:
    """When a process of this host started, in ticks since boot; None where there is none. Numbers are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _alive(content: bytes) -> bool | None:
    """Whether the holder that a file names is there; None: not to be known here."""
    try:
        holder = json.loads(content)
        here = _me()
        if any(holder[key] != here[key] for key in ("host", "boot", "space")):
            return None
        return start_of(int(holder["pid"])) == holder["started"]
    except (ValueError, KeyError, TypeError):  # being written, or cut off
        return None


def _described(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return f"since {holder['since']} by process {holder['pid']} on {holder['host']} ({holder['command'][:200]})"
    except (ValueError, KeyError, TypeError):
        return "by somebody unknown"
