"""Importing torch: most of what a rank asks of the file system before its first step."""

import functools
import inspect
import os
import sys
from typing import Any

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def import_torch() -> None:
    """Import torch, with half the calls to the file system.

    While torch is imported it registers some hundred operators, and asks `inspect` for the module and the line of each
    call. `inspect` answers from the sources: it resolves the file of every module there is, and reads those that call.
    A thousand ranks do that at once, on one file system. A frame knows its module and line by itself. Nor does torch
    look through all that is installed for devices of other makers, unless TORCH_DEVICE_BACKEND_AUTOLOAD is set.
    """
    if "torch" in sys.modules:
        return
    getmodule, getframeinfo = inspect.getmodule, inspect.getframeinfo

    @functools.wraps(getmodule)
    def of_frames(object: Any, _filename: str | None = None) -> Any:
        if inspect.isframe(object):
            return sys.modules.get(object.f_globals.get("__name__", ""))
        return getmodule(object, _filename)

    @functools.wraps(getframeinfo)
    def without_source(frame: Any, context: int = 1) -> inspect.Traceback:
        if not inspect.isframe(frame):
            return getframeinfo(frame, context)
        return inspect.Traceback(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, None, None)

    inspect.getmodule, inspect.getframeinfo = of_frames, without_source
    autoload = os.environ.get(_AUTOLOAD)
    os.environ.setdefault(_AUTOLOAD, "0")
    try:
        import torch  # noqa: F401
    finally:
        if autoload is None:
            del os.environ[_AUTOLOAD]
        inspect.getmodule, inspect.getframeinfo = getmodule, getframeinfo
