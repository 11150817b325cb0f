"""Which kind a source is of: one module of `loaders.sources.kinds` for each. A new kind is a new module there.

Such a module has `KIND` (its name for --kind), `HELP` (what SOURCE looks like), `accepts(source) -> bool` (whether
this is such a source, cheaply) and `listing(source, under) -> Listing`. Where several accept, one with
`GENERAL = True` stands back. One with `SETTINGS` (name → what it does, with its default) is given those of --set too:
`listing(source, under, settings)`.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from loaders.errors import UserError, check_regular, reading, unknown
from loaders.sources import kinds as modules_of
from loaders.sources.classes import expand
from loaders.sources.listing import Listing


def kinds() -> dict[str, ModuleType]:
    """The modules and packages of `loaders.sources.kinds` by their KIND."""
    names = sorted(module.name for module in pkgutil.iter_modules(modules_of.__path__))
    modules = [importlib.import_module(f"{modules_of.__name__}.{name}") for name in names]
    return {module.KIND: module for module in modules}


def find_source(source: str, kind: str | None = None) -> ModuleType:
    """The module for this source: the one named, else the one that accepts what is there."""
    known = kinds()
    with reading(source, "a source", "name another"):
        for path in expand(source):
            check_regular(path)
    if kind is not None:
        if kind not in known:
            raise UserError(f"unknown kind of source {kind!r}; there are {', '.join(known)}")
        return known[kind]
    for module in sorted(known.values(), key=lambda module: getattr(module, "GENERAL", False)):
        with reading(source, f"a source of kind {module.KIND}"):
            if module.accepts(source):
                return module
    expected = "; ".join(f"{name}: {module.HELP}" for name, module in known.items())
    if ":" not in source and not any(Path(path).exists() for path in expand(source)):
        raise UserError(f"there is nothing at {source}; SOURCE may be – {expected}")
    raise UserError(f"{source} is not a source that can be packed; SOURCE may be – {expected}")


def list_source(module: ModuleType, source: str, under: str | None, settings: Mapping[str, str]) -> Listing:
    """What the source holds. UserError for a setting that its kind does not have."""
    known = getattr(module, "SETTINGS", {})
    for name in settings:
        if not known:
            raise UserError(f"sources of kind {module.KIND} have no settings; leave --set {name}=… away")
        if name not in known:
            raise unknown(f"setting of {module.KIND}", name, known)
    with reading(source, f"a source of kind {module.KIND}"):
        return module.listing(source, under, settings) if known else module.listing(source, under)
