"""Gray PNG of 16 bits, alone and among images of 8 bits, through both pipelines, against float64 oracles."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import map_coordinates

from loaders.packs.shard import Pack
from loaders.pipelines.order import TrainPlan
from loaders.pipelines.transform import flips, matrices, natural_train, xray_eval, xray_train
from loaders.sources.images import check_image
from tests.loaders.pipelines.test_transform import BACKENDS, evaluated, needs_dali, pack_of, trained
from tests.support.pictures import encoded, gray16, photo

STEP = 1 / 257  # one grey level of 16 bits, where white is 255
SIDE = 48


def packed(path, files):
    checked = [check_image(data) for data in files]
    return pack_of(path, [(c.data, c.height, c.width) for c in checked])


def png(pixels):
    return encoded(Image.fromarray(pixels), "PNG")


def squares(white):
    return [gray16(seed, SIDE, SIDE, white) for seed in range(16)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Gray of 16 bits beside gray and colour of 8 bits, JPEG and PNG, of several shapes."""
    files = []
    for seed in range(4):
        height, width = 90 + 10 * seed, 140 - 20 * seed
        color = photo(seed, height, width)
        files += [png(gray16(seed, height, width, white)) for white in (65535, 4095)]
        files += [encoded(image, kind) for image in (color, color.convert("L")) for kind in ("PNG", "JPEG")]
    return packed(tmp_path_factory.mktemp("mixed") / "p.h5", files)


def test_a_pack_knows_whether_it_holds_16_bits(tmp_path):
    deep = packed(tmp_path / "deep.h5", [png(gray16(1)), encoded(photo(1))])
    shallow = packed(tmp_path / "shallow.h5", [encoded(photo(2)), encoded(photo(2), "PNG")])
    assert (deep.bits, shallow.bits) == (16, 8)
    assert Pack.open([shallow.path, deep.path]).bits == 16
    assert Pack.open(shallow.path).attributes["bits"] == 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("white", [4095, 65535])
def test_every_grey_level_arrives(tmp_path, backend, white):
    pictures = squares(white)
    found = evaluated(packed(tmp_path / "p.h5", map(png, pictures)), xray_eval(SIDE), backend)
    for picture, pixels in zip(found, pictures, strict=True):
        assert torch.equal(picture[0], picture[1])
        assert torch.equal(picture[0], picture[2])
        expected = 255 * pixels.astype(np.float64) / 65535
        assert np.abs(picture[0].numpy() - expected).max() < 0.1 * STEP
        assert len(picture.unique()) == len(np.unique(pixels)) > 500


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_images_are_evaluated_on_one_scale(mixed, backend):
    """Against torch's antialiased resizing in float64; 8 bits may be rounded once more on the way."""
    found = evaluated(mixed, xray_eval(SIDE), backend)
    for i, picture in enumerate(found):
        opened = Image.open(io.BytesIO(mixed.record(i).tobytes()))
        deep = opened.mode == "I;16"
        pixels = np.asarray(opened if deep else opened.convert("L"), np.float64) * (STEP if deep else 1)
        planes = torch.from_numpy(pixels).expand(3, -1, -1)
        height, width = planes.shape[1:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = planes[None, :, top : top + side, left : left + side]
        expected = torch.nn.functional.interpolate(square, (SIDE, SIDE), mode="bilinear", antialias=True)[0]
        difference = (picture - expected).abs()
        if deep:
            assert difference.max() < 0.5 * STEP
        else:
            assert difference.mean() < 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("white", [4095, 65535])
def test_training_turns_pictures_without_losing_levels(tmp_path, backend, white):
    """Against SciPy's bilinear interpolation in float64."""
    pictures, transform = squares(white), xray_train(SIDE)
    found = trained(packed(tmp_path / "p.h5", map(png, pictures)), transform, backend, steps=1)
    (part,) = TrainPlan(np.arange(16), global_batch=16, seed=2).step(0)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    mirrored = flips(transform, part.draws)
    assert mirrored.any()
    for picture, record, matrix, mirror in zip(found, part.ids, matrices(transform, part.draws), mirrored, strict=True):
        from_x, from_y = np.einsum("ij,jhw->ihw", matrix.astype(np.float64), np.stack([x, y, np.ones_like(x)]))
        pixels = pictures[record].astype(np.float64) * STEP
        pixels = pixels[:, ::-1] if mirror else pixels
        expected = map_coordinates(pixels, [from_y - 0.5, from_x - 0.5], order=1, mode="grid-constant")
        # Places in float32 are right to 1e-4 of a pixel; an edge goes from white to black within one.
        assert np.abs(picture[0].numpy() - expected).max() < 2e-4 * pixels.max()
        assert len(picture.unique()) > 500


@pytest.mark.parametrize("backend", BACKENDS)
def test_8_and_16_bits_of_one_image_are_trained_alike(tmp_path, backend):
    grays = [np.asarray(photo(seed, 80, 70, "L")) for seed in range(16)]
    shallow = packed(tmp_path / "8.h5", map(png, grays))
    deep = packed(tmp_path / "16.h5", [png(gray.astype(np.uint16) * 257) for gray in grays])
    for transform in (xray_eval(SIDE), xray_train(SIDE), natural_train(SIDE)):
        one, other = (trained(pack, transform, backend, steps=1) for pack in (shallow, deep))
        assert (one - other).abs().mean() < 1
        assert (one - other).abs().max() < 2
    bytewise = natural_train(SIDE, (2, 9))  # RandAugment is defined on bytes: both packs are the same there
    assert torch.equal(*(trained(pack, bytewise, backend, steps=1) for pack in (shallow, deep)))


@needs_dali
@pytest.mark.parametrize("transform", [xray_eval(SIDE), xray_train(SIDE), replace(xray_train(SIDE), size=160)])
def test_host_and_dali_make_the_same_of_mixed_images(mixed, transform):
    host, dali = (trained(mixed, transform, backend, steps=2) for backend in ("host", "dali"))
    assert (host - dali).abs().flatten(1).mean(1).max() < 1


@needs_dali
@pytest.mark.gpu
def test_a_gpu_makes_the_same_of_mixed_images(mixed):
    for transform in (xray_eval(SIDE), xray_train(SIDE)):
        gpu, cpu = (trained(mixed, transform, "dali", steps=2, device=device) for device in ("cuda", "cpu"))
        assert (gpu - cpu).abs().flatten(1).mean(1).max() < 2
