"""A file as an array of bytes, with no descriptor kept: a pack may have more shards than a process may open files.

Where a file is cut off while it is mapped, whoever reads what is gone gets SIGBUS, be it a decoder's thread in C. Then
the process ends as over other input that cannot be used: with a message that names the file, and code 2.
"""

import ctypes
import mmap
import os
import signal
import threading
import weakref
from pathlib import Path

import numpy as np

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBC.signal.restype = ctypes.c_void_p
_LIBC.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
_FAILED = ctypes.c_void_p(-1).value
_CODE = 2  # as of a UserError
_mapped: dict[int, tuple[Path, int]] = {}  # address → file and its size
_speaking = threading.Lock()
_before: int | None = None  # the handler of SIGBUS that was there, once ours is


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file as (size,) uint8, read-only and not read yet; mapped as long as a view of them is held.

    Python's own `mmap` would keep the file open all the while. OSError as the system has it.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return np.empty(0, np.uint8)
        address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    memory = (ctypes.c_ubyte * size).from_address(address)
    # Not at exit: other threads may read until the process is gone.
    weakref.finalize(memory, _unmap, address, size).atexit = False
    _mapped[address] = path, size
    _guard()
    array = np.frombuffer(memoryview(memory), np.uint8)
    array.flags.writeable = False
    return array


def _unmap(address: int, size: int) -> None:
    del _mapped[address]
    _LIBC.munmap(address, size)


def _guard() -> None:
    """Take SIGBUS from now on. By libc: what Python's `signal` sets is called by the interpreter only when the reading
    that cannot go on has."""
    global _before
    if _before is None:
        _before = _LIBC.signal(signal.SIGBUS, ctypes.cast(_on_bus_error, ctypes.c_void_p)) or 0


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_bus_error(number: int) -> None:
    """In whichever thread has read. It stands at that very instruction, in no lock of the interpreter or of malloc, so
    it can take the GIL and run Python; what it returns to is the same instruction.

    Several threads may come here at once. The one that speaks keeps the rest waiting until the process is gone, and
    until then the handler is ours: under the one of before, another thread's reading would end the process wordlessly.
    """
    with _speaking:
        for path, size in list(_mapped.values()):
            try:
                now = os.stat(path).st_size
            except OSError:  # removed, which takes nothing away from who has it mapped
                continue
            if now < size:
                said = (
                    f"the pack {path} is shorter now ({now:,} bytes, before {size:,}): it was cut off while it was in "
                    "use; put it back, and the same command goes on"
                )
                os.write(2, f"error: {said}\n".encode(errors="backslashreplace"))
                os._exit(_CODE)
        _LIBC.signal(number, _before)  # not of ours: the instruction is read again, under the handler of before
