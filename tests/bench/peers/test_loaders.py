"""The loaders that others are measured against: each delivers what the same work is for all."""

from itertools import islice

import pytest

from bench.peers import loaders, turns
from loaders.pipelines.transform import natural_train
from tests.support.pictures import folder


@pytest.mark.parametrize("name", [turns.HOST, "torchvision DataLoader"])
def test_batches_are_full_though_the_images_are_no_multiple(tmp_path, name):
    folder(tmp_path / "images", height=60, width=60)  # 12 images
    how = {"batch": 5, "threads": 1, "transform": natural_train(loaders.SIZE), "device": "cpu"}
    stream = loaders.loaders()[name](loaders.prepare(str(tmp_path / "images"), tmp_path, None, 95, **how))
    assert [len(images) for images in islice(stream, 5)] == [5] * 5
    stream.close()
