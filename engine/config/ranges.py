"""What values a key may have, declared with its default; checked when a configuration is made, shown by `--help`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from loaders.errors import UserError

_RANGE, _CHOICES, _WORD = "range", "choices", "word"
LARGEST = 2**40
"""No number of a configuration may be larger, whatever its bounds: far above any use, and what is computed of two such
still is a number."""


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers between two bounds, which belong to it unless `above` or `below` says otherwise."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    several: bool = False  # the key has a list of numbers, each in the range
    length: int | None = None  # so many
    rising: bool = False  # none less than the one before

    def holds(self, value: float) -> bool:
        """Whether a number is finite and within the bounds; exact for integers of any size."""
        finite = isinstance(value, int) or math.isfinite(value)
        return (
            finite
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def fault(self, value: Any) -> str | None:
        """What a value must be, where it is not; None stands for a key that is not set."""
        if value is None:
            return None
        if any(abs(one) > LARGEST for one in (value if self.several else [value]) if self.holds(one)):
            return f"must be at most {LARGEST:,}"
        if not self.several:
            return None if self.holds(value) else f"must be {self}"
        if self.length is not None and len(value) != self.length:
            return f"must be {self.length} numbers, each {self}"
        if not all(self.holds(one) for one in value):
            return f"each must be {self}"
        if self.rising and list(value) != sorted(value):
            return "must rise"
        return None

    def __str__(self) -> str:
        low, high = self.at_least, self.at_most
        if low is not None and high is not None:
            return f"{low:,} to {high:,}"
        bounds = [
            f"{low:,} or more" if low is not None else "",
            f"more than {self.above:,}" if self.above is not None else "",
            f"at most {high:,}" if high is not None else "",
            f"less than {self.below:,}" if self.below is not None else "",
        ]
        return ", ".join(bound for bound in bounds if bound)


def number(
    default: float | None,
    at_least: float | None = None,
    at_most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A field of one number, within the bounds of a `Range`."""
    return dataclasses.field(default=default, metadata={_RANGE: Range(at_least, at_most, above, below)})


def numbers(
    default: Sequence[float] | None,
    at_least: float | None = None,
    at_most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    length: int | None = None,
    rising: bool = False,
) -> Any:
    """A field of a list of numbers, each within the bounds of a `Range`; perhaps so many, perhaps rising."""
    allowed = Range(at_least, at_most, above, below, several=True, length=length, rising=rising)
    return dataclasses.field(default_factory=lambda: _copied(default), metadata={_RANGE: allowed})


def _copied(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else list(values)


def number_or(word: str, at_least: int, at_most: int | None = None) -> Any:
    """A field, a text or None, of a whole number within bounds or a word; None unless given."""
    return dataclasses.field(default=None, metadata={_RANGE: Range(at_least, at_most), _WORD: word})


def one_of(default: str, *others: str) -> Any:
    """A field of one word of several; the first one is its default."""
    return dataclasses.field(default=default, metadata={_CHOICES: (default, *others)})


def declared(item: dataclasses.Field[Any]) -> str:
    """What a field may be, for `--help`: a range or the words; empty where nothing is declared."""
    word = f" | {item.metadata[_WORD]}" if _WORD in item.metadata else ""
    return str(item.metadata.get(_RANGE, "")) + word or " | ".join(item.metadata.get(_CHOICES, ()))


class Section:
    """A part of a configuration, which checks its fields against what they may be."""

    PREFIX: ClassVar[str] = ""  # of its keys, such as "data."

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            key = f"{self.PREFIX}{item.name.removesuffix('_')}"
            if _WORD in item.metadata and value is not None:
                value = _number_unless(item.metadata[_WORD], key, value)
            if (allowed := item.metadata.get(_RANGE)) and (fault := allowed.fault(value)):
                raise UserError(f"{key}={value}: {fault}")
            if (choices := item.metadata.get(_CHOICES)) and value not in choices:
                raise UserError(f"{key}={value} is unknown; choose one of {', '.join(choices)}")


def _number_unless(word: str, key: str, value: str) -> int | None:
    """The number that a text is; None where it is the word. UserError for another text."""
    if value == word:
        return None
    if not (value.isascii() and value.isdecimal() and len(value) < 16):
        raise UserError(f"{key}={value}: must be a whole number, or {word}")
    return int(value)
