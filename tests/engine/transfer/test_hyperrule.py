import pytest

from engine.transfer.hyperrule import rule
from loaders.errors import UserError

SMALL = (500, (200, 300, 400), 100, 0.0)
MEDIUM = (10_000, (3_000, 6_000, 9_000), 500, 0.1)
LARGE = (20_000, (6_000, 12_000, 18_000), 500, 0.1)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, SMALL), (19_999, SMALL), (20_000, MEDIUM), (499_999, MEDIUM), (500_000, LARGE), (14_000_000, LARGE)],
)
def test_by_training_set_size(size, expected):
    found = rule(size, 300, 300)
    assert (found.steps, found.milestones, found.warmup, found.mixup) == expected


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(32, 32, (160, 128)), (95, 96, (160, 128)), (96, 96, (512, 480)), (48, 192, (512, 480)), (48, 191, (160, 128))],
)
def test_by_area(height, width, expected):
    found = rule(100, height, width)
    assert (found.resize, found.crop) == expected


def test_nothing_to_train_on():
    with pytest.raises(UserError, match="found 0 images"):
        rule(0, 32, 32)
