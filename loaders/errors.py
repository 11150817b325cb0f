"""The one error that is meant for the person at the keyboard."""

import contextlib
import difflib
import errno
import os
import resource
import stat
from collections.abc import Iterable, Iterator, Sequence

_SHOWN = 8  # names listed in a message before "…"
_ADVICE = {
    errno.EACCES: "you may not do that there; ask its owner, or see `ls -l` and `id`",
    errno.EPERM: "you may not do that there; ask its owner, or see `ls -l` and `id`",
    errno.EAGAIN: "another program holds a lock on it, or the machine is short of something; wait, or end that program",
    errno.ENOLCK: "this file system does not lock; with HDF5_USE_FILE_LOCKING=FALSE packs are read without",
    errno.EBUSY: "another program uses it; wait, or end that program",
    errno.ENFILE: "all programs of this machine together have too many open",
    errno.ENOMEM: "see `ulimit -v` and vm.max_map_count, or give the job more memory",
    errno.ENOSPC: "free some, or name another place",
    errno.EDQUOT: "free some of your quota, or name another place",
    errno.EFBIG: "see `ulimit -f`, and what the file system allows",
    errno.EROFS: "name another place",
    errno.EIO: "the disk or file server failed, not what is stored there; see its log, then try again",
    errno.ESTALE: "the file server replaced or removed it while it was in use; try again",
}
# What says nothing of the file: any other would have met it too, and this one may be read another time.
_PASSING = frozenset((
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT,
    errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ECONNRESET,
))  # fmt: skip


class UserError(ValueError):
    """Input that cannot be used. The message says what was found, what was expected, and what to do.

    Command lines print it as `error: …` and exit with code 2; anything else that escapes is a defect of ours.
    """


class SystemRefusal(UserError):
    """The system would not open, read or write a file, which is not said to be damaged by that."""


def in_words(error: Exception, known: str = "") -> str:
    """An error in words; of an OSError the file, what the system says of it, and what to do where that is known.

    `known`: what was said before, so that a file in it need not be named again.
    """
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    named = (os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes))
    files = " → ".join(name for name in named if name not in known)
    advice = _ADVICE.get(error.errno, "")
    if error.errno == errno.EMFILE:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        advice = f"this process may have {soft:,}; raise that, such as `ulimit -n {max(hard, soft)}`"
    return (f"{files}: " if files else "") + os.strerror(error.errno) + (f" ({advice})" if advice else "")


def is_passing(error: OSError) -> bool:
    """Whether the state of the machine, or of a file server, is to blame, rather than this file."""
    return error.errno in _PASSING


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Around what reads or writes a file: what the system refuses becomes a SystemRefusal of `what`, with its reason.

    An OSError without a number is of a library, about what is in a file, and passes.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise SystemRefusal(f"{what}: {in_words(error, what)}") from error


@contextlib.contextmanager
def reading(place: str | os.PathLike[str], what: str, advice: str = "copy or download it again") -> Iterator[None]:
    """At the edge of a reader of bytes that somebody else wrote: whatever these lead its parser to becomes a UserError
    that names `place`, a file and where in it is read. UserErrors pass: they say more.

    `what`: what is expected there, such as "a table".
    """
    try:
        with told(f"{os.fspath(place)} cannot be read"):
            yield
    except UserError:
        raise
    except Exception as error:  # over damaged bytes parsers raise nearly anything
        raise UserError(f"{os.fspath(place)} is damaged, or not {what} ({reason(error)}); {advice}") from error


def check_regular(path: str | os.PathLike[str]) -> None:
    """UserError for a pipe, a socket or a device, which may have no end; files, folders, and what is not there pass."""
    with told(f"{os.fspath(path)} cannot be read"):
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{os.fspath(path)} is no file, but a pipe, a socket or a device; name a file or a folder")


def reason(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def shorten(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:_SHOWN]) + (f", … ({len(names):,} in all)" if len(names) > _SHOWN else "")


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is none of the known ones; it says which is nearest, and all there are."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"there is no {what} {name!r}; {hint}there are: {', '.join(known)}")
