"""Does the program that flips bits see what is unnoticed? Its thousand cases are `make damage`."""

import pytest

from loaders.packs.shard import Pack
from tests.fuzz.bitflips import flips


def test_each_flip_is_noticed_where_it_should_be():
    assert flips(12, 1) == {"record, named by its checksum": 6, "index, refused when opened": 6}


@pytest.mark.parametrize(
    ("blind", "returns", "said"),
    [("verify", [], "record, unnoticed by verify"), ("unsound", [], "record, unnoticed in training")],
)
def test_what_is_unnoticed_is_counted(monkeypatch, blind, returns, said):
    monkeypatch.setattr(Pack, blind, lambda self, *_: returns)
    assert flips(12, 1)[said] > 0
