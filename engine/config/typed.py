"""Values as people typed them: YAML makes 010 eight, 1e5 a float, no a false, and cuts a text at " #"."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from typing import Any

import yaml
from omegaconf import OmegaConf

from loaders.errors import UserError

NAMES = ("HOME", "USER", "RUNS", "PACKS", "DATA", "SCRATCH", "WORK", "PROJECT", "TMPDIR", "SLURM_JOB_ID")
"""Of the environment, what recipes and sweeps may name."""
MORE = "BOOSTERBIT_ENV"
"""Holds further such names, separated by commas."""
_QUOTES = ("'", '"')
_TEXTUAL = {str, int, float, bool}  # what OmegaConf converts from text itself, with the field's type in mind


class AsTyped(yaml.SafeLoader):
    """A loader for which every plain scalar is a text, but for null and the merge key `<<`."""


AsTyped.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_as_typed(text: str) -> Any:
    """YAML whose scalars are all texts or None. YAMLError where it is no YAML."""
    return yaml.load(text, AsTyped)  # noqa: S506  a SafeLoader


def overlay(schema: type, read: Any, typed: Any) -> Any:
    """What YAML read (plain containers), with the text as typed for each field of the schema that is one value.

    Fields of any type (packs) have texts, too, or lists of them. What the schema does not know stays as it was read.
    """
    if not isinstance(read, Mapping) or not isinstance(typed, Mapping):
        return read
    hints = typing.get_type_hints(schema)
    made = {}
    for key, value in read.items():
        kind, text = hints.get(_field(str(key))), typed.get(str(key))
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            made[key] = overlay(kind, value, text)
        elif (kind is Any and text is not None) or (_is_value(kind) and isinstance(text, str)):
            made[key] = text
        else:
            made[key] = value
    return made


def from_word(schema: type, key: str, text: str) -> tuple[bool, Any]:
    """Whether the value of `key=text` is one to be taken as typed, and that value: a text, None, or a list of texts.

    Quotes around all of it are taken away, and null is none where a field may be none.
    """
    kind: Any = schema
    for part in key.split("."):
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            return False, None
        kind = typing.get_type_hints(kind).get(_field(part))
    if kind is not Any and not _is_value(kind):
        return False, None
    text = text.strip()
    if text == "null" and (kind is Any or type(None) in typing.get_args(kind)):
        return True, None
    if kind is Any and text[:1] == "[" and text[-1:] == "]":
        inside = text[1:-1]
        if any(quote in inside for quote in _QUOTES):
            return True, read_as_typed(text)
        return True, [place.strip() for place in inside.split(",")] if inside.strip() else []
    if len(text) > 1 and text[0] == text[-1] and text[0] in _QUOTES:
        return True, read_as_typed(text)
    return True, text


def environment(name: str, *default: Any) -> Any:
    """What `${oc.env:NAME}` and `${oc.env:NAME,DEFAULT}` stand for: of the names in `NAMES` only, for what is resolved
    is printed and kept beside a run. UserError for another name, KeyError for one that is not set."""
    allowed = (*NAMES, *os.environ.get(MORE, "").replace(",", " ").split())
    if name not in allowed:
        raise UserError(
            f"${{oc.env:{name}}} is not read: of the environment only {', '.join(allowed)} are; export {MORE}={name} "
            "allows it, or write the value"
        )
    if name not in os.environ and not default:
        raise KeyError(f"Environment variable '{name}' not found")
    return os.environ[name] if name in os.environ else default[0]


def as_word(key: str, value: Any) -> str:
    """`key=value` that `from_word` or YAML reads as this value: a text, None, a number, or a list of such."""
    plain = isinstance(value, str) and value == value.strip() and value not in ("", "null") and value[0] not in "[{'\""
    text = value if plain else yaml.safe_dump(value, default_flow_style=True, width=float("inf")).splitlines()[0]
    return f"{key}={text}"


def _field(key: str) -> str:
    return "from_" if key == "from" else key  # Python keeps the word for itself


def _is_value(kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        kinds = set(typing.get_args(kind)) - {type(None)}
        return len(kinds) == 1 and kinds <= _TEXTUAL
    return kind in _TEXTUAL if isinstance(kind, type) else False


OmegaConf.register_resolver("oc.env", environment, replace=True)
