"""A figure in README or docs is recomputed from a committed record, or says what else it is."""

import pytest

from tests.conftest import ROOT
from tests.support import claims
from tests.support.figures import Page

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_figure_has_a_record_or_says_what_it_is(path):
    page = Page(str(path.relative_to(ROOT)), path.read_text())
    found = claims.faults(page, ROOT)
    assert not found, "\n\n" + "\n\n".join(found)
