"""A figure in README or docs is recomputed from a committed record, or says what else it is; the gate itself works."""

import json
import subprocess

import pytest

from tests.conftest import ROOT
from tests.support import claims
from tests.support.figures import Page

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECORDS = [
    path
    for kind in ("*.json", "*.jsonl")
    for path in sorted((ROOT / "docs" / "results").rglob(kind))
    if path.name != "environment.json" and not path.name.endswith(".about.json")
]
FACTS = {"commit": "0123abc", "hardware": {"cpu": "Z80"}, "versions": {"torch": "3"}, "n": 3, "spread": "low and high"}
STEP = FACTS | {"supports": ["optimizer"], "step": {"median": 8.778, "low": 7.14, "high": 9.3}, "ratio": 5.557}


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_figure_has_a_record_or_says_what_it_is(path):
    found = claims.faults(Page(name(path), path.read_text()), ROOT)
    assert not found, "\n\n" + "\n\n".join(found)


@pytest.mark.parametrize("path", RECORDS, ids=name)
def test_every_record_carries_what_a_claim_needs(path):
    claims.read_record(path)


def test_records_are_committed():
    listed = subprocess.run(["git", "ls-files", "docs/results"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: what is committed cannot be told")
    assert {name(path) for path in RECORDS} <= set(listed.stdout.splitlines())


@pytest.fixture
def gate(tmp_path):
    """gate(text, …): faults of a page, with records docs/results/step.json (as STEP, or changed) and runs.jsonl."""

    def check(text, page="docs/page.md", **changes):
        folder = tmp_path / "docs" / "results"
        folder.mkdir(parents=True, exist_ok=True)
        kept = {key: value for key, value in (STEP | changes).items() if value is not None}
        (folder / "step.json").write_text(json.dumps(kept))
        rows = [{"seed": seed, "source": "a", "metric_value": value} for seed, value in enumerate((80, 82, 84))]
        (folder / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "runs.about.json").write_text(json.dumps(FACTS | {"supports": ["transfer"]}))
        (tmp_path / "tests").mkdir(exist_ok=True)
        (tmp_path / "tests" / "test_x.py").write_text("assert error < 1e-6\n")
        claims.read_record.cache_clear()
        return claims.faults(Page(page, text), tmp_path)

    return check


@pytest.mark.parametrize("text", [
    "It takes 12 ms.", "It takes 12ms.", "a step of 3.5\nseconds", "about 1,622 images/s", "58 GB/s", "76.74% top-1",
    "90 to 110 ms", "3.4× as fast", "3x faster", "5.6 times faster than timm", "0.76 of the time of torch's",
    "It is twice as fast.", "half the time", "ten times faster", "reached 93.1 ± 0.4", "over n = 9 turns", "`12 ms`",
    "an error of 1.7e-6", "peak of 822 MiB", "18 points more", "1365 passed",
    "| | images/s |\n|---|---|\n| ours | 1,622 |", "| what | |\n|---|---|\n| a step, ms | 8.8 |",
    "```\n GPUs  images/s\n 1  11.07\n```",
])  # fmt: skip
def test_what_looks_measured_is_found(gate, text):
    fault = gate(f"# Page\n\n{text}\n")
    assert len(fault) == 1
    assert "<!-- claim" in fault[0] and "docs/results/" in fault[0]


@pytest.mark.parametrize("text", [
    "R50x1 with 25,549,352 parameters in fp32, batches of 64 at 224 pixels, torch 2.14.1, sm_90", "seeds 0 to 4",
    "two ranks, three classes, both halves", "1, 5 or 10 shots", "crops of 36 × 36", "commit 2e35306", "see page 12",
    "[results](results/loader-256.json)", "`data.size=32` and `1e-4`", "```sh\nsleep --time 5 --steps=0.3\n```",
])  # fmt: skip
def test_other_numbers_are_left_alone(gate, text):
    assert gate(f"# Page\n\n{text}\n") == []


@pytest.mark.parametrize("text", [
    "It takes 8.8 ms <!-- claim optimizer: results/step.json step.median -->.",
    "It takes 8.78 ms (7.1–9.3), n = 3 <!-- claim optimizer: results/step.json pick(step, 'median low high'); n -->.",
    "<!-- claim optimizer: results/step.json step.median; ratio -->\n| | ms | ratio |\n|---|---|---|\n| a | 9 | 5.56 |",
    "<!-- claim optimizer: results/step.json step.median\n1 / ratio -->\n```\ntook 8.778 ms, 0.18\n```",
    "A score of 82.0 ± 2.0 <!-- claim transfer: results/runs.jsonl rows.score(source='a') -->",
    "<!-- claim optimizer: results/step.json step.median -->\n<!-- claim optimizer: results/step.json ratio -->\n"
    "It takes 8.8 ms, and 5.6 times faster.",
    "An error of 1e-6 <!-- tested: tests/test_x.py -->.", "300 s before the end <!-- setting: of the job script -->",
    "129 images/s <!-- published: arXiv 2106.00116, Table 2 -->", "modelled: 12 hours <!-- modelled: bench/plan -->",
])  # fmt: skip
def test_what_is_answered_for_passes(gate, text):
    assert gate(f"# Page\n\n{text}\n") == []


@pytest.mark.parametrize(("text", "says"), [
    ("It takes 8.7 ms <!-- claim optimizer: results/step.json step.median -->.", "8.778 for `step.median`"),
    ("It takes 8.78 s, 8.88 s <!-- claim optimizer: results/step.json step.median -->.", "8.88 is not among"),
    ("It takes 8.8 ms <!-- claim optimizer: results/other.json step.median -->.", "no such record"),
    ("It takes 8.8 ms <!-- claim optimizer: results/step.json step.mean -->.", "there is no 'mean'"),
    ("It takes 8.8 ms <!-- claim optimizer: results/step.json step -->.", "no number"),
    ("It takes 8.8 ms <!-- claim optimizer: results/step.json step +* 0 -->.", "cannot be computed"),
    ("It takes 8.8 ms <!-- claim optimizer: results/step.json 8.8 -->.", "names nothing of the record"),
    ("It takes 8.8 ms <!-- claim results/step.json -->.", "is no claim"),
    ("It takes 8.8 ms <!-- claim engine: results/step.json step.median -->.", "the topic 'engine'"),
    ("It takes 8.8 ms <!-- claim training: results/step.json step.median -->.", "claims training"),
    ("So training is 5.6 times faster <!-- claim optimizer: results/step.json ratio -->.", "claims training"),
    ("R50x1 trains 5.6 times faster <!-- claim optimizer: results/step.json ratio -->.", "claims training"),
    ("A training step takes 8.8 ms <!-- claim optimizer: results/step.json step.median -->.", "claims training"),
    ("It takes 8.8 ms <!-- setting: chosen so -->.", "is a speed"),
    ("It takes 8.8 ms <!-- counted: by hand -->.", "is a speed"),
    ("It takes 8.8 s <!-- setting: -->.", "says too little"),
    ("It takes 8.8 hours <!-- modelled: bench/plan -->.", "called modelled"),
    ("An error of 2e-6 <!-- tested: tests/test_x.py -->.", "does not have 2e-6"),
    ("An error of 1e-6 <!-- tested: tests/test_y.py -->.", "is no test"),
    ("<!-- page: setting: all of it -->\n\n8 ms", "a whole page can only be"),
])  # fmt: skip
def test_what_the_record_does_not_say_fails(gate, text, says):
    assert any(says in fault for fault in gate(f"# Page\n\n{text}\n"))


@pytest.mark.parametrize("fact", claims.NEEDED)
def test_a_record_without_one_of_its_facts_supports_nothing(gate, fact):
    text = "8.8 ms <!-- claim optimizer: results/step.json step.median -->"
    assert gate(text) == []
    assert any(f"lacks {fact}" in fault for fault in gate(text, **{fact: None}))


@pytest.mark.parametrize(("changes", "says"), [
    ({"supports": ["optimizer", "glory"]}, "supports glory"), ({"hardware": {"cores": 2}}, "neither cpu nor gpu"),
    ({"commit": "unknown"}, "commit is 'unknown'"), ({"n": 0}, "n is 0"), ({"supports": ["modelled"]}, "modelled"),
])  # fmt: skip
def test_facts_of_a_record_are_looked_at(gate, changes, says):
    faults = gate("8.8 ms <!-- claim optimizer: results/step.json step.median -->", **changes)
    assert any(says in fault for fault in faults)


def test_a_claim_covers_its_own_sentence_item_or_row_only(gate):
    claim = "<!-- claim optimizer: results/step.json step.median -->"
    assert len(gate(f"8.8 ms {claim}, and 3 ms.")) == 1
    assert len(gate(f"* 8.8 ms {claim}\n* 3 ms")) == 1
    assert len(gate(f"{claim}\n8.8 ms\n\n3 ms")) == 1
    assert len(gate(f"| ms | |\n|---|---|\n| a | 8.8 ms {claim} |\n| b | 3 ms |")) == 1


ENTRY = "# Log\n\n## 2026-11-24: a trial\n\nOn: a Z80.\nRecord: none kept.\n\nIt took 8 ms.\n"


@pytest.mark.parametrize(("change", "says"), [
    (("2026-11-24: a trial", "A trial"), "begins"), (("On: a Z80.\n", ""), "lacks a line `On: …`"),
    (("Record: none kept.\n", ""), "lacks a line `Record: …`"),
    (("# Log\n", "# Log\n\nIt took 8 ms.\n"), "dated entry"),
    (("took 8 ms.\n", "took 8 ms.\n\n## 2026-11-25: later\n\nOn: a Z80.\nRecord: none kept.\n"), "newest first"),
])  # fmt: skip
def test_the_log_has_its_own_rule(gate, change, says):
    assert gate(ENTRY, page=claims.LOG) == []
    faults = gate(ENTRY.replace(*change), page=claims.LOG)
    assert len(faults) == 1 and says in faults[0]
