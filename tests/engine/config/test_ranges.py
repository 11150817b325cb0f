"""What a key may be: each number of the schema has bounds, and nothing outside them gets through."""

import dataclasses
import math
import types
import typing

import pytest

from engine.config.data import DataConfig, TargetConfig
from engine.config.loading import explain, load
from engine.config.ranges import Range, declared
from engine.config.schema import (
    AgcSgdConfig,
    CommConfig,
    FinetuneConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RuleConfig,
    ScheduleConfig,
    TrainConfig,
)
from loaders.errors import UserError

SECTIONS = (DataConfig, TargetConfig, ModelConfig, AgcSgdConfig, OptimConfig, ScheduleConfig, TrainConfig, CommConfig)


def _kinds(schema, name):
    hint = typing.get_type_hints(schema)[name]
    return set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}


NUMERIC = (int, float, list[int], list[float])
NUMBERS = [
    pytest.param(schema, item, _kinds(schema, item.name), id=f"{schema.__name__}.{item.name}")
    for schema in (*SECTIONS, RuleConfig, PretrainConfig, FinetuneConfig)
    for item in dataclasses.fields(schema)
    if any(kind in NUMERIC for kind in _kinds(schema, item.name))
]


@pytest.mark.parametrize(("schema", "item", "kinds"), NUMBERS)
def test_each_number_declares_what_it_may_be(schema, item, kinds):
    assert declared(item), f"{item.name}: declare its range with number(…) or numbers(…)"


@pytest.mark.parametrize(("schema", "item", "kinds"), NUMBERS)
def test_no_number_is_nan_infinite_or_negative(schema, item, kinds):
    several = kinds & {list[int], list[float]}
    worst = [-1] if kinds & {int, list[int]} else [-1.0, math.nan, math.inf, -math.inf]
    for value in worst:
        given = [value] * (item.metadata["range"].length or 1) if several else value
        with pytest.raises(UserError, match=rf"{item.name.removesuffix('_')}=.*must be"):
            schema(**{item.name: given})


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("data.zoom=[0,0]", "data.zoom=.*each must be more than 0"),
        ("data.zoom=[1.1,0.9]", "must rise"),
        ("data.zoom=[1]", "must be 2 numbers"),
        ("data.randaugment=[2]", "must be 2 numbers"),
        ("data.randaugment=[2,31]", "each must be 0 to 30"),
        ("data.size=0", "data.size=0: must be 1 to 8,192"),
        ("data.scale=[.nan,1]", "each must be"),
        (f"train.seed={2**64}", "train.seed"),
        (f"data.size={10**30}", "data.size"),
        ("schedule.milestones=[30,.inf]", "each must be 0 or more"),
        ("schedule.epochs=.nan", "schedule.epochs"),
        ("optim.momentum=1", "0 or more, less than 1"),
        ("comm.slice_mib=1e300", "comm.slice_mib"),
    ],
)
def test_a_number_out_of_range_is_refused_with_what_it_may_be(word, says):
    with pytest.raises(UserError, match=says):
        load(PretrainConfig, "imagenet1k_r50x1", ["data.train=a.h5", word], "pretrain")


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "text"),
    [
        ({"at_least": 1, "at_most": 3}, [1, 2, 3], [0, 4, math.nan], "1 to 3"),
        ({"above": 0, "at_most": 1}, [1e-300, 1], [0, 1.0000001], "more than 0, at most 1"),
        ({"at_least": 0, "below": 2**32}, [0, 2**32 - 1], [2**32, -1], "0 or more, less than 4,294,967,296"),
        ({"above": 0}, [1e308, 10**400], [0, math.inf], "more than 0"),
    ],
)
def test_bounds(bounds, inside, outside, text):
    allowed = Range(**bounds)
    assert [allowed.holds(value) for value in inside] == [True] * len(inside)
    assert [allowed.holds(value) for value in outside] == [False] * len(outside)
    assert str(allowed) == text


def test_help_shows_ranges_and_words():
    lines = explain(PretrainConfig).splitlines()
    assert any("data.size=224" in line and line.endswith("[1 to 8,192]") for line in lines)
    assert any("data.shuffle=full" in line and line.endswith("[full | blocks]") for line in lines)


@pytest.mark.parametrize("value", ["auto", "1", "32", "010"])
def test_a_number_or_a_word(value):
    assert TrainConfig(micro_batch=value).micro_batch == value


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "1e3", "²", "", "9" * 30, str(2**41)])
def test_neither_a_number_in_range_nor_the_word(value):
    with pytest.raises(UserError, match="train.micro_batch="):
        TrainConfig(micro_batch=value)
