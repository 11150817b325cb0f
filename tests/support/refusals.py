"""The system refusing something, for real, as far as a test can have it so."""

import contextlib
import fcntl
import os
import resource


@contextlib.contextmanager
def no_descriptor_left(spare=0):
    """No further file can be opened than `spare`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = []
    for _ in range(spare + 1):
        free.append(os.dup(0))
    for descriptor in free:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def no_permission(path):
    """Nobody may read `path`, not even root, who becomes someone else for that time."""
    mode, user = path.stat().st_mode, os.geteuid()
    path.chmod(0)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(mode)


@contextlib.contextmanager
def locked(path):
    """Another one holds a lock on `path`, as a program does that writes to it."""
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def small_files(size):
    """No file can become longer than `size` bytes: the nearest to a full disk that one process can have alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def little_memory(more):
    """This process may take only so many bytes more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
