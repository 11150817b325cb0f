"""Planting faults: the sample is the seed's, nothing but the copy is touched, and each outcome is what it says."""

import json
import shutil
from collections import Counter

import pytest

from tests.conftest import ROOT
from tests.support import mutants, own_tests
from tests.support.mutations import Mutation, sample

MODULE = '''"""Shares."""


def share(part: int | None, whole: int = 10) -> float:
    """Of the whole."""
    if part is None or part < 0:
        return 0.0
    while part > whole:
        part -= whole
    return part / whole
'''
TESTS = """
from room.module import share

def test_share():
    assert share(5) == 0.5
    assert share(None) == 0.0
    assert share(15) == 0.5
"""


@pytest.fixture
def tree(tmp_path):
    """A tree of one module and its tests, with what runs them."""
    root = tmp_path / "sound"
    for name in ("room", "tests/support", "tests/room"):
        (root / name).mkdir(parents=True)
    (root / "room" / "module.py").write_text(MODULE)
    (root / "tests" / "room" / "test_module.py").write_text(TESTS)
    shutil.copy(ROOT / "tests" / "support" / "warm.py", root / "tests" / "support")
    return root


@pytest.fixture
def worker(tree):
    worker = mutants.Worker(warm=(), copy=lambda target: shutil.copytree(tree, target))
    yield worker
    worker.close()


def plant(before, after):
    assert MODULE.count(before) == 1
    mutation = Mutation("room/module.py", "", 0, 1, MODULE)
    mutation.__dict__["text"] = MODULE.replace(before, after)
    return mutation


def test_each_fault_is_planted_in_the_copy_only_and_judged(tree, worker):
    seconds = worker.sound(["tests/room"], {}, None)
    assert list(seconds) == ["tests/room/test_module.py::test_share"]
    for before, after, outcome in [
        ("part / whole", "part * whole", "killed"),
        ("part < 0", "part < 1", "survived"),  # no test has a part of 0
        ("part -= whole", "part -= 0", "timeout"),
        ("return 0.0", "import os; os.abort()", "killed"),
        ("def share", "def shares", "killed"),  # the tests cannot be imported
        ("whole: int = 10", "whole: int = 2 * 5", "survived"),  # those before are gone
    ]:
        least = 1 if outcome == "timeout" else 60  # the one goes on for ever, the others must not run out of time
        found = worker.judge(plant(before, after), ["tests/room"], seconds, least=least)
        assert found["outcome"] == outcome, f"{after}: {found}\n{worker.log()}"
        assert (worker.root / "room" / "module.py").read_text() == MODULE
    assert (tree / "room" / "module.py").read_text() == MODULE
    worker.close()
    assert not worker.root.exists()


def test_tests_that_fail_without_a_fault_judge_nothing(worker):
    (worker.root / "room" / "module.py").write_text(MODULE.replace("part / whole", "0"))
    with pytest.raises(RuntimeError, match="failed without any fault: .*test_share"):
        worker.sound(["tests/room"], {}, None)


def test_a_test_that_takes_too_long_is_left_out_where_one_has_no_patience(worker):
    path = worker.root / "tests" / "room" / "test_module.py"
    path.write_text(TESTS + "\ndef test_slowly():\n    import time\n    time.sleep(300)\n")
    seconds = worker.sound(["tests/room"], {}, 1.0)
    assert [name.partition("::")[2] for name in seconds if seconds[name] < 1] == ["test_share"]
    fault = plant("part / whole", "whole / part")
    assert worker.judge(fault, ["tests/room"], seconds, 1.0)["by"].endswith("test_share")


@pytest.fixture
def places(tmp_path):
    """places(text, seed): the faults of a module of this text, in the seed's order, as (before, after)."""
    pytest.importorskip("cosmic_ray", reason="cosmic-ray is not installed")

    def changes(text, seed=0):
        (tmp_path / "module.py").write_text(text)
        return [mutation.change for mutation in sample(tmp_path, ["module.py"], 100, seed)]

    return changes


def test_the_sample_has_one_fault_from_each_place_and_none_from_annotations(places):
    found = places(MODULE)
    expected = {
        "whole: int = 10": 1,  # the number
        "part is None or part < 0": 5,  # is, or, <, 0, and the condition as a whole
        "return 0.0": 1,
        "part > whole": 2,
        "part / whole": 1,
    }
    assert len(found) == sum(expected.values())
    for text, n in expected.items():
        assert sum(text in before for before, _ in found) == n, text
    for before, after in found:
        compile(MODULE.replace(before, after), "module.py", "exec")
        assert ("None" in before) == ("None" in after)


def test_the_order_is_the_seeds_and_hardly_changes_with_the_module(places):
    found = places(MODULE)
    assert found == places(MODULE)
    assert found != places(MODULE, seed=1)
    longer = places(MODULE.replace('"""Shares."""', '"""Shares."""\n\nTOP = 7'))
    assert [change for change in longer if "TOP" not in change[0]] == found


def test_outcomes_are_kept_and_survivors_are_judged_by_all_tests(tree, tmp_path, monkeypatch):
    pytest.importorskip("cosmic_ray", reason="cosmic-ray is not installed")
    asked = []

    class Worker:
        """Tests that take long notice what is wrong with the loop; none notices the 0."""

        def sound(self, tests, seconds, patience):
            return {"a test": 0.1}

        def judge(self, mutation, tests, seconds, patience):
            asked.append((mutation.change, patience))
            survived = "0.0" in mutation.change[0] or (patience and "while" in mutation.change[0])
            return {"outcome": "survived" if survived else "killed", "by": "a test", "seconds": 0.1}

        def close(self):
            return

    for module in (mutants, own_tests):
        monkeypatch.setattr(module, "ROOT", tree)
    monkeypatch.setattr(mutants, "Worker", Worker)
    chosen = sample(tree, ["room/module.py"], 100, 0)

    def campaign():
        asked.clear()
        return [found["outcome"] for found in mutants.judged(chosen, tmp_path / "outcomes.jsonl", 2, 1.0)]

    first = campaign()
    changes = [mutation.change for mutation in chosen]
    assert sorted(change for change, patience in asked if patience == 1.0) == sorted(changes)
    again = [change[0] for change, patience in asked if patience is None]
    assert sorted(again) == sorted(before for before, _ in changes if "0.0" in before or "while" in before)
    assert first == ["survived" if "0.0" in before else "killed" for before, _ in changes]
    assert campaign() == first and not asked
    test = tree / "tests" / "room" / "test_module.py"
    test.write_text(test.read_text() + "\n# more\n")
    assert campaign() == first and len(asked) == len(changes) + len(again)
    monkeypatch.setattr(mutants, "equivalent", lambda: {("room/module.py", *change): "why" for change in changes})
    assert mutants.report(chosen, [{"outcome": name, "by": ""} for name in first])["survived"] == 0


def test_every_module_has_tests_that_judge_it():
    for module in own_tests.modules():
        for test in own_tests.tests_of(module):
            assert (ROOT / test).is_file(), f"{module}: {test}"
    for place in own_tests.OWN:
        assert (ROOT / place).exists(), place


def test_what_is_called_equivalent_is_still_there_and_says_why():
    for (module, before, _), why in mutants.equivalent().items():
        lines = [line.strip() for line in (ROOT / module).read_text().splitlines()]
        assert before in "\n".join(lines), f"{module} has no longer: {before}"
        assert len(why) > 20, f"{module}: {before}: why?"


def test_the_record_is_within_the_bar():
    record = json.loads((ROOT / "docs" / "results" / "mutants.json").read_text())
    outcomes = Counter(fault["outcome"] for fault in record["faults"])
    killed = outcomes["killed"] + outcomes["timeout"]
    assert record["n"] == len(record["faults"]) == sum(outcomes.values()) == 200
    assert (record["killed"], record["survived"], record["equivalent"]) == (
        killed, outcomes["survived"], outcomes["equivalent"])  # fmt: skip
    assert record["share"] == round(killed / (killed + outcomes["survived"]), 4) >= mutants.BAR
    assert all(fault["why"] for fault in record["faults"] if fault["outcome"] == "equivalent")
