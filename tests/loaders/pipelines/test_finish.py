import numpy as np
import pytest
import torch

from loaders.pipelines.finish import Finisher
from loaders.pipelines.transform import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    bit_train,
    natural_eval,
    natural_train,
    xray_eval,
    xray_train,
)


def pictures(seed, shapes=((50, 70), (32, 32), (9, 200), (1, 1), (31, 5))):
    """Smooth, as in a photograph: rounding is all that may differ."""
    rng = np.random.default_rng(seed)
    return [
        np.ascontiguousarray(
            (127 + 100 * np.sin(np.indices((h, w, 3)).sum(0) / 9 + rng.uniform(0, 6))).astype(np.uint8)
        )
        for h, w in shapes
    ]


@pytest.mark.parametrize("threads", [1, 3])
def test_resized_mirrored_and_normalized(threads):
    finisher = Finisher(natural_train(32), threads, keep=2)
    images, flips = pictures(1), np.array([0, 1, 1, 0, 1], dtype=np.int32)
    found = finisher.submit(images, flips).result()
    finisher.close()
    assert found.shape == (5, 32, 32, 3)
    mean, std = torch.tensor(IMAGENET_MEAN).double(), torch.tensor(IMAGENET_STD).double()
    for image, flip, ours in zip(images, flips, found.double(), strict=True):
        exact = torch.from_numpy(image).double().permute(2, 0, 1)[None]  # float64: the oracle rounds nothing
        exact = torch.nn.functional.interpolate(exact, (32, 32), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
        exact = exact.flip(1) if flip else exact
        assert ((ours * std + mean) * 255 - exact).abs().max() < 1.01


def test_memory_is_used_again_only_when_nobody_holds_it():
    finisher = Finisher(natural_train(16), 1, keep=2)
    flips = np.zeros(5, np.int32)
    held = finisher.submit(pictures(1), flips).result()
    before, view = held.clone(), held.permute(0, 3, 1, 2)[2:]
    place = held.data_ptr()
    del held
    others = [finisher.submit(pictures(seed), flips).result() for seed in range(2, 6)]
    assert torch.equal(view.permute(0, 2, 3, 1), before[2:])  # a view alone keeps it
    assert place not in [other.data_ptr() for other in others]
    del view
    again = finisher.submit(pictures(9), flips).result()
    assert again.data_ptr() == place
    finisher.close()


def test_a_picture_that_fails_fails_its_batch():
    finisher = Finisher(natural_train(16), 2, keep=1)
    batch = finisher.submit([np.zeros((0, 5, 3), np.uint8)], np.zeros(1, np.int32))
    with pytest.raises(RuntimeError):
        batch.result()
    finisher.close()


def test_only_windows_of_whole_pixels_without_warps_suit():
    assert all(map(Finisher.suits, (natural_train(), xray_eval())))
    assert not any(map(Finisher.suits, (natural_eval(), bit_train(160, 128), xray_train(), natural_train(224, (2, 9)))))
