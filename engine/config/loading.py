"""From a recipe (YAML) and `key=value` on the command line to a checked configuration, before anything starts.

OmegaConf merges, interpolates and checks types. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import io
import itertools
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import MISSING, DictConfig, OmegaConf

from engine.config import typed
from engine.config.ranges import declared
from engine.config.schema import FinetuneConfig, PretrainConfig
from loaders.arguments import expanded
from loaders.errors import UserError, reading, reason, unknown

Config = TypeVar("Config", PretrainConfig, FinetuneConfig)
_VARIANTS = "variants"  # key of a recipe: name → settings
PLACES = ("folder", "results", "from", "model.weights", "data.train", "data.val", "data.test")
"""Keys whose values are places on disk, or lists of such."""


def recipes(kind: str) -> dict[str, Path]:
    """Recipes that come with the engine: name → file; kind "pretrain" or "finetune"."""
    folder = Path(str(resources.files("engine.config") / "recipes" / kind))
    return {path.stem: path for path in sorted(folder.glob("*.yaml")) if not path.stem.startswith("_")}


def named_variants(path: Path) -> list[str]:
    """What may follow a recipe's name after an @: its own named departures, and those of what it extends."""
    return [str(name) for name in _with_base(path).get(_VARIANTS) or ()]


def load(schema: type[Config], recipe: str, overrides: list[str], kind: str) -> Config:
    """The configuration of `recipe` (a name from `recipes(kind)` or a YAML file) with `key=value` overrides.

    `RECIPE@VARIANT` is the recipe with the settings that stand under `variants: VARIANT:` in it, or in what it extends;
    its name gets `_VARIANT`.

    Raises UserError for an unknown recipe, variant or key (naming the nearest), a wrong type, a missing value.
    """
    from_file = _read(recipe, kind, schema)
    from_line: Any = OmegaConf.create({})
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{text!r} is not key=value; for example train.global_batch=256")
        if not value:
            raise UserError(f"{key}= has no value; give one, or {key}=null for none")
        try:
            is_typed, as_typed = typed.from_word(schema, key, value)
            if is_typed:
                OmegaConf.update(from_line, key, as_typed, force_add=True)
            else:
                from_line = OmegaConf.merge(from_line, OmegaConf.from_dotlist([text]))
        except Exception as error:  # OmegaConf and the YAML parser raise nearly anything
            raise UserError(f"cannot read {text!r}: {reason(error)}") from error
    for given, origin in ((from_file, recipe), (from_line, "the command line")):
        _rename(given)
        _check_keys(schema, given, "", origin)
    try:
        base = OmegaConf.structured(schema)
        _thaw(base)
        merged = OmegaConf.merge(base, from_file, from_line)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            names = ", ".join(f"{key.removesuffix('_')}=…" for key in missing)
            raise UserError(f"{recipe} leaves open what the command line must say: {names}")
        return cast(Config, _at_home(OmegaConf.to_object(merged)))
    except UserError:
        raise
    except Exception as error:  # OmegaConf's own, and Python's of containers that do not merge
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        if reason(error).startswith(UserError.__name__):  # as OmegaConf passes on what a resolver raises
            raise UserError(f"{recipe}: {reason(error).partition('resolving interpolation: ')[2]}") from error
        key = (getattr(error, "full_key", None) or "value").removesuffix("_")
        raise UserError(f"{recipe}: {key}: {reason(error)}") from error


def _at_home(config: Any, prefix: str = "") -> Any:
    """A configuration whose places begin with the home folder where they were written with a ~."""
    changed: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value, key = getattr(config, item.name), prefix + item.name.removesuffix("_")
        if dataclasses.is_dataclass(value):
            changed[item.name] = _at_home(value, f"{key}.")
        elif key in PLACES:
            many = isinstance(value, list)
            named = [expanded(each) if isinstance(each, str) else each for each in (value if many else [value])]
            changed[item.name] = named if many else named[0]
    return dataclasses.replace(config, **changed)


def variants(overrides: list[str], keys: tuple[str, ...]) -> list[list[str]]:
    """One list of overrides for each combination of comma-separated values that `keys` have: `seed=0,1,2` is three."""
    choices = []
    for text in overrides:
        key, _, value = text.partition("=")
        choices.append([f"{key}={one.strip()}" for one in value.split(",")] if key in keys else [text])
    return [list(chosen) for chosen in itertools.product(*choices)]


def to_yaml(config: PretrainConfig | FinetuneConfig) -> str:
    """The resolved configuration as YAML that `load` reads back."""
    plain = dataclasses.asdict(config)
    if "from_" in plain:
        plain["from"] = plain.pop("from_")
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def explain(schema: type) -> str:
    """All keys with defaults, comments and what they may be, as engine/config/ declares them: the text of `--help`."""
    return "\n".join(_explain(schema, "", None))


def _explain(schema: type, prefix: str, section: Any) -> list[str]:
    lines = []
    comments = _comments(schema)
    for item in dataclasses.fields(schema):
        if section is not None:
            default = getattr(section, item.name)
        else:
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        name = prefix + item.name.removesuffix("_")
        if dataclasses.is_dataclass(default):
            lines.extend(_explain(type(default), f"{name}.", default))
            continue
        shown = "…" if default == MISSING else "none" if default is None else default
        allowed = f" [{text}]" if (text := declared(item)) else ""
        lines.append(f"  {f'{name}={shown}':<40} {comments.get(item.name, '')}{allowed}".rstrip())
    return lines


def _comments(schema: type) -> dict[str, str]:
    found = {}
    sources = [inspect.getsource(cls) for cls in schema.__mro__ if dataclasses.is_dataclass(cls)]
    for line in "\n".join(sources).splitlines():
        code, _, comment = line.partition("  # ")
        if ":" in code:
            found[code.split(":")[0].strip()] = comment.strip()
    return found


def _read(recipe: str, kind: str, schema: type) -> DictConfig:
    known = recipes(kind)
    path, variant = known.get(recipe) or Path(expanded(recipe)), None
    if not path.is_file() and "@" in recipe:
        plain, _, variant = recipe.rpartition("@")
        path = known.get(plain) or Path(expanded(plain))
    if not path.is_file():
        near = difflib.get_close_matches(recipe, known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"recipe {recipe!r}: neither a file nor one of {', '.join(known)}{hint} (--list describes them)"
        )
    content = _with_base(path, schema)
    choices = content.pop(_VARIANTS, None)
    return content if variant is None else _varied(content, choices, variant, path)


def _varied(content: DictConfig, choices: Any, variant: str, path: Path) -> DictConfig:
    """The content of a recipe, and over it that of one of its variants, whose name the run gets too."""
    if not isinstance(choices, DictConfig) or not choices:
        raise UserError(f"{path.stem} has no variants; give its name without @{variant}")
    if not isinstance(chosen := choices.get(variant), DictConfig):
        raise unknown(f"variant of {path.stem}", variant, tuple(str(name) for name in choices))
    named = OmegaConf.create({"name": f"{content.get('name', path.stem)}_{variant}"})
    return cast(DictConfig, OmegaConf.merge(content, named, chosen))


def _with_base(path: Path, schema: type | None = None) -> DictConfig:
    """The content of a YAML file, merged into that of the file beside it that its key `extends` names."""
    with reading(path, "YAML", "mend it"):
        text = path.read_text(encoding="utf-8")
        content = OmegaConf.load(io.StringIO(text))
        if schema and isinstance(content, DictConfig):
            content = OmegaConf.create(_as_typed(schema, OmegaConf.to_container(content), typed.read_as_typed(text)))
    if not isinstance(content, DictConfig):
        raise UserError(f"{path} holds a {type(content).__name__}, not a mapping of keys to values")
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str) or "/" in base or not base:
        raise UserError(f"{path} extends {base!r}; expected the name of a recipe beside it, without .yaml")
    file = path.with_name(f"{base}.yaml")
    if not file.is_file() or file == path:
        raise UserError(f"{path} extends {base}, but there is no other file {file}")
    return cast(DictConfig, OmegaConf.merge(_with_base(file, schema), content))


def _as_typed(schema: type, read: Any, text: Any) -> Any:
    """A recipe whose texts, and those of its variants, are as they were typed."""
    found = typed.overlay(schema, read, text)
    if isinstance(choices := found.get(_VARIANTS), dict):
        found[_VARIANTS] = {
            name: typed.overlay(schema, chosen, text[_VARIANTS].get(str(name))) for name, chosen in choices.items()
        }
    return found


def _rename(given: DictConfig) -> None:
    # Python keeps the word `from` for itself, so the field is called `from_`.
    if "from" in given:
        given["from_"] = given.pop("from")


def _check_keys(schema: type, given: Any, prefix: str, origin: str) -> None:
    fields = {item.name: item for item in dataclasses.fields(schema)}
    for key in given:
        full = f"{prefix}{key}"
        if key not in fields:
            known = [name.removesuffix("_") for name in _all_keys(schema, prefix)]
            wrong = full + _first_leaf(given[key])
            near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.0)
            raise UserError(f"unknown key {wrong} in {origin}; the nearest known key is {near[0]}")
        default = fields[key].default_factory
        section = default() if default is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(section) and OmegaConf.is_missing(given, key) is False:
            value = given[key]
            if not isinstance(value, DictConfig):
                raise UserError(
                    f"{full}={value} in {origin}: {full} is a section; set one of its keys, such as "
                    f"{next(iter(_all_keys(type(section), f'{full}.')))}"
                )
            _check_keys(type(section), value, f"{full}.", origin)


def _first_leaf(value: Any) -> str:
    """`.key.key…` down to the first value below a section; empty for a value."""
    if not isinstance(value, DictConfig) or not value:
        return ""
    key = str(next(iter(value)))
    return f".{key}{_first_leaf(value[key])}"


def _all_keys(schema: type, prefix: str) -> list[str]:
    keys = []
    for item in dataclasses.fields(schema):
        section = item.default_factory() if item.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(section):
            keys.extend(_all_keys(type(section), f"{prefix}{item.name}."))
        else:
            keys.append(prefix + item.name)
    return keys


def _thaw(node: DictConfig) -> None:
    # Frozen dataclasses arrive read-only; they are merged into before they become objects again.
    OmegaConf.set_readonly(node, None)
    for key in node:
        inner = node._get_node(key)
        if not OmegaConf.is_missing(node, key) and isinstance(inner, DictConfig):
            _thaw(inner)
