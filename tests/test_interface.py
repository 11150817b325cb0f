"""A change of what users type, or of what their programs read, is a decision."""

from tests.conftest import ROOT
from tests.support.interface import interface

ADVICE = """
Keys, options or columns have changed. If that is meant: say it in docs/changes.md, and
    python -m tests.support.interface > tests/interface.txt
"""


def test_what_users_type_and_read_is_what_was_decided():
    decided = (ROOT / "tests" / "interface.txt").read_text().splitlines()
    found = interface()
    gone = "".join(f"\n- {line}" for line in decided if line not in found)
    new = "".join(f"\n+ {line}" for line in found if line not in decided)
    assert not gone and not new, ADVICE + gone + new


def test_every_decision_has_an_entry():
    """docs/changes.md is there, newest first, and says what has not been released yet."""
    headings = [line for line in (ROOT / "docs" / "changes.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0] == "## Unreleased"
