"""Importing torch: most of what a rank asks of the file system before its first step."""

import functools
import inspect
import sys
from typing import Any


def import_torch() -> None:
    """Import torch, with half the calls to the file system.

    While torch is imported it registers some hundred operators, and asks `inspect` for the module and the line of each
    call. `inspect` answers from the sources: it resolves the file of every module there is, and reads those that call.
    A thousand ranks do that at once, on one file system. A frame knows its module and line by itself.
    """
    if "torch" in sys.modules:
        return
    getmodule, getframeinfo = inspect.getmodule, inspect.getframeinfo

    @functools.wraps(getmodule)
    def of_frames(object: Any, _filename: str | None = None) -> Any:
        if inspect.isframe(object):
            return sys.modules.get(object.f_globals.get("__name__", ""))
        return getmodule(object, _filename)

    inspect.getmodule, inspect.getframeinfo = of_frames, functools.partial(getframeinfo, context=0)
    try:
        import torch  # noqa: F401
    finally:
        inspect.getmodule, inspect.getframeinfo = getmodule, getframeinfo
