"""What the published X-ray transform does otherwise: reflection, means over areas; and the resize that keeps aspect."""

import importlib.util
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats
from skimage.transform import resize_local_mean
from torchvision.transforms import functional as reference

from loaders.errors import UserError
from loaders.packs.shard import Pack
from loaders.packs.writer import Record, ShardWriter, new_attributes
from loaders.pipelines.batches import eval_batches, train_batches
from loaders.pipelines.finish import resize_by_area
from loaders.pipelines.order import EvalPlan, TrainPlan, step_draws
from loaders.pipelines.randaugment import warp_reflected
from loaders.pipelines.transform import (
    Affine,
    Transform,
    bit_train,
    matrices,
    natural_train,
    windows,
    xray_eval,
    xray_train,
)
from tests.support.pictures import encoded, gray16, photo

HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
BACKENDS = ["host", pytest.param("dali", marks=pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed"))]
SHAPES = [(210, 330), (301, 229), (96, 96), (400, 97), (60, 80), (96, 200)]


def pack_of(path, images):
    with ShardWriter(path, ["a"], new_attributes({"source": "made up", "kind": "test"}, 1)[0]) as writer:
        for i, image in enumerate(images):
            writer.add(Record(encoded(image, "PNG"), f"image {i}", 0, image.height, image.width))
        writer.finish()
        writer.publish()
    return Pack.open(path)


@pytest.fixture(scope="module")
def gray(tmp_path_factory):
    """Pictures without loss, gray, so that decoders cannot differ; of much detail, so that filters do."""
    images = [detailed(i, shape, 255) for i, shape in enumerate(SHAPES)]
    return pack_of(tmp_path_factory.mktemp("gray") / "p.h5", images)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """The same in 16 bits."""
    images = [detailed(i, shape, 65535) for i, shape in enumerate(SHAPES)]
    return pack_of(tmp_path_factory.mktemp("deep") / "p.h5", images)


def detailed(seed, shape, white):
    smooth = gray16(seed, *shape, white).astype(float)
    noise = np.random.default_rng(seed).uniform(-0.2, 0.2, shape) * white
    return Image.fromarray((smooth + noise).clip(0, white).astype(np.uint8 if white == 255 else np.uint16))


def levels(images):
    return (images.double() * 0.5 + 0.5) * 255


def evaluated(pack, transform, backend):
    batches = eval_batches(pack, EvalPlan(np.arange(len(pack)), batch=len(pack)), transform, backend=backend)
    return levels(torch.cat([batch.images for batch in batches]))


def trained(pack, transform, backend, steps=3):
    plan = TrainPlan(np.arange(len(pack)), global_batch=len(pack), seed=4)
    batches = list(train_batches(pack, plan, transform, last_step=steps, backend=backend))
    parts = [plan.step(step)[0] for step in range(steps)]
    ids, draws = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "draws"))
    return levels(torch.cat([step[0].images for step in batches])), ids, draws


def centre_square(pack, i):
    """Of the picture, in 0..255 float64, without rounding."""
    image = Image.open(io.BytesIO(pack.record(i).tobytes()))
    pixels = np.asarray(image).astype(np.float64)
    pixels = pixels / 257 if image.mode.startswith("I") else pixels
    side = min(pixels.shape)
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


def by_skimage(square, size):
    """As scikit-image has INTER_AREA; smaller pictures are enlarged bilinearly, as torchvision does."""
    if len(square) >= size:
        return resize_local_mean(square, (size, size), preserve_range=True)
    return reference.resize(torch.from_numpy(square)[None], [size, size], antialias=True)[0].numpy()


@pytest.mark.parametrize("size", [1, 7, 50, 83])
@pytest.mark.parametrize("channels", [1, 3])
def test_means_over_areas_are_those_of_scikit_image(size, channels):
    image = np.random.default_rng(size).integers(0, 256, (91, 83, channels), dtype=np.uint8)
    exact = resize_local_mean(image.astype(np.float64), (size, size), channel_axis=2, preserve_range=True)
    found = resize_by_area(torch.from_numpy(image), (0, 0, 91, 83), size)
    assert found.dtype == torch.uint8
    assert np.abs(found.numpy() - exact).max() <= 0.5 + 1e-6
    floats = resize_by_area(torch.from_numpy(image.astype(np.float32)), (0, 0, 91, 83), size)
    np.testing.assert_allclose(floats.numpy(), exact, atol=1e-4)


def test_the_mean_over_a_window_counts_parts_of_pixels():
    """Against weights by overlap, written out; windows that begin and end within pixels."""
    rng = np.random.default_rng(0)
    image = rng.random((20, 30, 1)).astype(np.float32)
    for top, left, bottom, right in [(0.25, 1.5, 19.75, 29.0), (3.0, 0.0, 20.0, 30.0), (2.9, 7.1, 12.9, 17.1)]:
        weights = []
        for n, lo, hi in ((20, top, bottom), (30, left, right)):
            edges = lo + (hi - lo) / 10 * np.arange(11)
            at = np.arange(n)
            overlap = np.minimum(edges[1:, None], at + 1) - np.maximum(edges[:-1, None], at)
            weights.append(overlap.clip(0) * 10 / (hi - lo))
        exact = weights[0] @ image[:, :, 0].astype(np.float64) @ weights[1].T
        found = resize_by_area(torch.from_numpy(image), (top, left, bottom, right), 10)
        np.testing.assert_allclose(found[:, :, 0].numpy(), exact, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pictures", ["gray", "deep"])
def test_x_rays_are_downscaled_by_area(pictures, backend, request):
    pack = request.getfixturevalue(pictures)
    found = evaluated(pack, replace(xray_eval(96), downscale="area"), backend)
    for i, image in enumerate(found):
        exact = by_skimage(centre_square(pack, i), 96)
        assert np.abs(image[0].numpy() - exact).max() < (1.01 if pictures == "gray" else 0.02), SHAPES[i]
        assert torch.equal(image[0], image[2])


def reflected(square, matrix, size):
    """Bilinear, in float64, over the mirror images that NumPy makes: SciPy calls it mirror."""
    y, x = np.indices((size, size)) + 0.5
    (a, b, c), (d, e, f) = matrix.astype(np.float64)
    at = np.stack([d * x + e * y + f, a * x + b * y + c]) - 0.5
    return ndimage.map_coordinates(square, at, order=1, mode="mirror")


@pytest.mark.parametrize("zoom", [(0.9, 1.1), (0.2, 0.3)])
def test_a_warp_may_reflect_many_times(zoom):
    image = np.random.default_rng(1).random((40, 40)).astype(np.float32) * 255
    transform = replace(xray_train(40), affine=Affine(45, zoom, 0.25, "reflect"))
    for matrix in matrices(transform, step_draws(3, 0, 0, 10)):
        found = np.asarray(warp_reflected(Image.fromarray(image), matrix.ravel().tolist()))
        np.testing.assert_allclose(found, reflected(image, matrix, 40), atol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pictures", ["gray", "deep"])
def test_the_published_transform_of_x_rays(pictures, backend, request):
    """Area, mirror, warp with reflection: each step by another library, in float64."""
    pack = request.getfixturevalue(pictures)
    transform = replace(xray_train(64), affine=Affine(translate=0.25, outside="reflect"), downscale="area")
    found, ids, draws = trained(pack, transform, backend)
    turned = matrices(transform, draws)
    for image, record, row, matrix in zip(found, ids, draws, turned, strict=True):
        small = by_skimage(centre_square(pack, record), 64)
        exact = reflected(small[:, ::-1] if row[22] < 0.5 else small, matrix, 64)
        difference = np.abs(image[0].numpy() - exact)
        assert difference.mean() < 0.6  # bytes twice rounded, and weights of 1/32 in DALI
        assert difference.max() < 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_outside_is_black_unless_it_is_asked_for(gray, backend):
    dark = [
        float((trained(gray, replace(xray_train(64), affine=Affine(outside=outside)), backend)[0] < 1).double().mean())
        for outside in ("black", "reflect")
    ]
    assert dark[0] > 0.1
    assert dark[1] < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(300, 420), (512, 333), (90, 900)])
def test_the_short_side_is_resized_and_a_crop_of_it_taken(tmp_path, shape, backend):
    """As torchvision's Resize(96) and a crop of 80 where it was drawn."""
    pack = pack_of(tmp_path / "p.h5", [photo(1, *shape)])
    transform = replace(bit_train(96, 80), kind="random_short_crop", flip=False)
    found, _, draws = trained(pack, transform, backend)
    resized = reference.resize(
        torch.from_numpy(np.array(photo(1, *shape))).permute(2, 0, 1).double(), 96, antialias=True
    )
    for image, row in zip(found, draws, strict=True):
        top, left = (int(row[20 + axis] * (resized.shape[1 + axis] - 80 + 1)) for axis in (0, 1))
        expected = resized[:, top : top + 80, left : left + 80]
        assert (image - expected).abs().mean() < 1


def test_crops_reach_every_place_of_the_long_side_too():
    transform = Transform("random_short_crop", 480, resize=512)
    box = windows(transform, np.tile([512, 600], (20_000, 1)), step_draws(5, 0, 0, 20_000))
    for axis, places in ((0, 33), (1, 121)):
        counts = np.bincount(np.rint(box[:, axis]).astype(int), minlength=places)
        assert len(counts) == places
        assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_crops_of_photographs_go_by_area_too(gray, backend):
    """Windows within a picture, in colour: the mean is that of the whole window."""
    transform = replace(natural_train(1), downscale="area", flip=False, mean=(0.5,) * 3, std=(0.5,) * 3)
    found, ids, draws = trained(gray, transform, backend, steps=1)
    for image, record, box in zip(found, ids, windows(transform, gray.sizes[ids], draws), strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(gray.record(record).tobytes()))).astype(float)
        top, left, height, width = box.astype(int)
        assert abs(image[0, 0, 0] - pixels[top : top + height, left : left + width].mean()) < 0.51


def test_what_is_unknown_is_refused():
    with pytest.raises(UserError, match="outside 'white'; there are black, reflect"):
        Affine(outside="white")
    with pytest.raises(UserError, match="downscale 'box'; there are linear, area"):
        Transform("xray", 8, downscale="box")
