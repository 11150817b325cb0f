"""Numbers that nobody means, in every place where one is typed: refused with a word, or trained with; no traceback."""

import argparse
import contextlib
import dataclasses
import math
import random
import re
import types
import typing

import pytest
import yaml

from engine import finetune, pretrain
from engine.comm.communicator import Communicator, SharedError
from engine.comm.launch import Launch
from engine.config.loading import load
from engine.config.ranges import LARGEST
from engine.config.schema import FinetuneConfig, PretrainConfig
from engine.transfer import sweep_file
from loaders.arguments import Number
from loaders.errors import UserError
from tests.conftest import ROOT

SCHEMAS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
STRANGE = [
    *("nan", ".nan", "inf", "-.inf", "-1", "0", "-0.0", "1.5", "1e5", "1e400", "5e-324", "0x10", "1_000", "²", "1:30"),
    *(str(2**64), str(-(2**64)), "9" * 5000, "true", "abc", "null", "~", "''", "2026-01-01", "!!int 3", "&a 1", "*a"),
    *(
        "[]",
        "[0,0]",
        "[2]",
        "[nan,1]",
        "[1,2,3]",
        "[[1]]",
        "[1,",
        "{}",
        "{a: 1}",
        "${x}",
        "${oc.env:NONE}",
        "@",
        "%",
        "|",
    ),
]


def numbers(schema, prefix=""):
    """(key, field) of the numeric fields of a schema."""
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        hint = hints[item.name]
        kinds = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
        if dataclasses.is_dataclass(hint):
            yield from numbers(hint, f"{prefix}{item.name}.")
        elif kinds & {int, float, list[int], list[float]}:
            yield f"{prefix}{item.name}", item


FIELDS = [pytest.param(kind, key, item, id=f"{kind}-{key}") for kind in SCHEMAS for key, item in numbers(SCHEMAS[kind])]


def value_of(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def packs(kind, place="p.h5"):
    return [
        f"data.train={place}",
        *([f"data.test={place}", "from=random", "model=R8x0.25-8px"] if kind == "finetune" else []),
    ]


@pytest.mark.parametrize(("kind", "key", "item"), FIELDS)
@pytest.mark.parametrize("where", ["line", "recipe"])
def test_what_is_typed_is_refused_or_within_its_range(kind, key, item, where, tmp_path):
    for text in STRANGE if where == "line" else STRANGE[::4]:  # both are read by the same code, files are slower
        recipe, words = "demo", [*packs(kind), f"{key}={text}"]
        if where == "recipe":
            content = f"name: mine\n{key.replace('.', ': {')}: {text}{'}' * key.count('.')}\n"
            (tmp_path / "mine.yaml").write_text(content, encoding="utf-8")
            recipe, words = str(tmp_path / "mine.yaml"), packs(kind)
        try:
            found = value_of(load(SCHEMAS[kind], recipe, words, kind), key)
        except UserError:
            continue
        allowed = item.metadata["range"]
        several = found if isinstance(found, list) else [] if found is None else [found]
        assert all(type(one) in (int, float) and math.isfinite(one) for one in several), text
        assert allowed.fault(found) is None and all(abs(one) <= LARGEST for one in several), text


def extremes(item):
    """The last values within a field's range."""
    allowed = item.metadata["range"]
    whole = "float" not in str(item.type)
    low = allowed.at_least if allowed.at_least is not None else 1 if whole else 5e-324
    high = (
        allowed.at_most
        if allowed.at_most is not None
        else math.nextafter(allowed.below, 0)
        if allowed.below
        else LARGEST
    )
    high = int(high) if whole else float(high)
    each = [value for value in (low, high) if allowed.holds(value)]
    return [[value] * (allowed.length or 1) for value in each] if allowed.several else each


LARGE = {
    "data.size",
    "data.resize",
    "train.global_batch",
    "batch",
    "data.prefetch",
    "data.threads",
    "model.num_classes",
}
"""Keys whose largest values mean nothing but more memory than there is."""
SMALL = {
    "pretrain": ["data.backend=host", "comm.backend=local", "data.val=null", "schedule.epochs=null", "schedule.steps=4",
                 "schedule.warmup_steps=1", "train.global_batch=4"],
    "finetune": ["data.backend=host", "comm.backend=local", "rule.steps=4", "batch=4", "shots=2"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "key", "item"), FIELDS)
def test_the_last_values_within_a_range_can_be_trained_with_or_are_refused(kind, key, item, digits, capsys):
    for value in extremes(item):
        if (key in LARGE and value > 64) or (key == "comm.timeout_s" and value < 60):  # a run may end by the latter
            continue
        words = [*packs(kind, digits / "high-test.h5"), *SMALL[kind], f"{key}={value}"]
        words += ["schedule.steps=null"] if key == "schedule.epochs" else []
        words += ["schedule.warmup_steps=null"] if key == "schedule.warmup_epochs" else []
        with contextlib.suppress(UserError, SharedError):
            config = load(SCHEMAS[kind], "demo", words, kind)
            run = {"pretrain": pretrain.pretrain, "finetune": finetune.finetune}[kind]
            run(config, Communicator(Launch("alone")), dry_run=True)


@pytest.mark.parametrize("key", ["lr", "rule.steps", "seeds", "shots", "data.size", "optim.eps", "batch"])
def test_sweeps_refuse_what_the_command_line_does(key, digits, tmp_path):
    target = {"recipe": "demo", "train": str(digits / "high-train.h5"), "test": str(digits / "high-test.h5")}
    for text in STRANGE:
        content = yaml.safe_dump({"name": "s", "checkpoints": {"r": "random"}, "targets": {"a": target}})
        if key in ("seeds", "shots"):
            content += f"{key}: {text}\nset: {{model: R8x0.25-8px}}\n"
        else:
            nested = f"{key.replace('.', ': {')}: {text}{'}' * key.count('.')}"
            content += f"set: {{model: R8x0.25-8px, {nested}}}\n"
        (tmp_path / "s.yaml").write_text(content, encoding="utf-8")
        with contextlib.suppress(UserError):
            for run in sweep_file.read(tmp_path / "s.yaml").runs:
                assert 0 <= run.config.seed < 2**32 and math.isfinite(run.config.lr) and run.config.lr > 0


def test_no_command_takes_a_number_otherwise():
    """Each option that is a number declares its bounds."""
    for room in ("engine", "loaders", "bench", "jobs"):
        for path in (ROOT / room).rglob("*.py"):
            assert not re.search(r"type=(int|float)\b", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("within", [(1, 8192), (0, 2**32 - 1), (0.0, 1.0), (1e-3, 1e6)])
def test_an_option_is_refused_or_within_its_bounds(within):
    draw = random.Random(0)
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", action=Number, within=within, default=None, help="of something (%(default)s)")
    assert f"[{within[0]:,} to {within[1]:,}]" in parser.format_help()
    texts = [*STRANGE, *(str(draw.uniform(-2, 2) * 10 ** draw.randint(-5, 12)) for _ in range(50)), *map(str, within)]
    accepted = 0
    for text in texts:
        try:
            found = parser.parse_args([f"--n={text}"]).n
        except UserError as error:
            assert str(error).startswith("--n is ") and f"{within[0]:,} to {within[1]:,}" in str(error)
            continue
        accepted += 1
        assert within[0] <= found <= within[1] and type(found) is type(within[0])
    assert accepted >= 2
