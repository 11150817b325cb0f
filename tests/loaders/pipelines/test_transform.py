"""DALI and the host against each other, against torchvision, and against DALI's own random crops."""

import importlib.util
import io
import math
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as reference

from loaders.errors import UserError
from loaders.packs.shard import Pack
from loaders.packs.writer import Record, ShardWriter, new_attributes
from loaders.pipelines.batches import eval_batches, train_batches
from loaders.pipelines.order import DRAWS, EvalPlan, TrainPlan, step_draws
from loaders.pipelines.transform import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    KINDS,
    RANDAUGMENT_OPS,
    Affine,
    Transform,
    bit_eval,
    bit_train,
    matrices,
    natural_eval,
    natural_train,
    randaugment_choices,
    regions,
    windows,
    xray_eval,
    xray_train,
)
from loaders.sources.images import check_image
from tests.support.pictures import deep_png, encoded, gray16, photo

HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
EVALUATIONS = {
    "natural": natural_eval(224),
    "bit small": bit_eval(128),
    "bit large": bit_eval(480),
    "xray": xray_eval(224),
}
BACKENDS = ["host", pytest.param("dali", marks=needs_dali)]


def pack_of(path, pictures):
    with ShardWriter(path, ["a"], new_attributes({"source": "made up", "kind": "test"}, 1)[0]) as writer:
        for i, (data, height, width) in enumerate(pictures):
            writer.add(Record(data, f"image {i}", 0, height, width))
        writer.finish()
        writer.publish()
    return Pack.open(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A pack of 16 smooth pictures of several shapes, as JPEG."""
    shapes = [(300 + 20 * (i % 5), 420 - 25 * (i % 7)) for i in range(16)]
    pictures = [(encoded(photo(i, *shape), quality=95), *shape) for i, shape in enumerate(shapes)]
    return pack_of(tmp_path_factory.mktemp("photos") / "p.h5", pictures)


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory):
    """A pack of 48 real ImageNet photographs."""
    source = shared / "data/imagenet-sample.tar"
    if not source.is_file():
        pytest.skip(f"{source} is not there")
    pictures = []
    with tarfile.open(source) as tar:
        for member in tar:
            if not member.isfile():
                continue
            data = tar.extractfile(member).read()
            image = Image.open(io.BytesIO(data))
            if image.mode in ("RGB", "L"):
                pictures.append((data, image.height, image.width))
            if len(pictures) == 48:
                break
    return pack_of(tmp_path_factory.mktemp("real") / "p.h5", pictures)


def levels(batch, transform):
    """Images back in 0..255."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (transform.mean, transform.std))
    return 255 * (batch.images.cpu() * std + mean)


def evaluated(pack, transform, backend, device="cpu"):
    plan = EvalPlan(np.arange(len(pack)), batch=8)
    batches = eval_batches(pack, plan, transform, backend=backend, device=device)
    return torch.cat([levels(b, transform)[b.valid.cpu()] for b in batches])


def trained(pack, transform, backend, steps=4, seed=2, **how):
    plan = TrainPlan(np.arange(len(pack)), global_batch=16, seed=seed)
    batches = train_batches(pack, plan, transform, last_step=steps, backend=backend, **how)
    return torch.cat([levels(step[0], transform) for step in batches])


def displayed(pack, i):
    image = Image.open(io.BytesIO(pack.record(i).tobytes())).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def by_torchvision(pack, name):
    """The evaluation transforms as torchvision has them, on uint8 with antialiasing, float output."""
    for i in range(len(pack)):
        image = displayed(pack, i).float()
        if name == "natural":
            image = reference.center_crop(reference.resize(image, 256, antialias=True), [224, 224])
        elif name == "xray":
            side = min(image.shape[1:])
            top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
            image = reference.rgb_to_grayscale(image, num_output_channels=3)  # the protocol: one channel, repeated
            image = reference.resize(image[:, top : top + side, left : left + side], [224, 224], antialias=True)
        else:
            side = 128 if name == "bit small" else 480
            image = reference.resize(image, [side, side], antialias=True)
        yield image


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation_is_what_torchvision_makes(photos, backend, name):
    found = evaluated(photos, EVALUATIONS[name], backend)
    expected = torch.stack(list(by_torchvision(photos, name)))
    difference = (found - expected).abs()
    assert difference.mean() < 1  # of 255
    assert difference.flatten(1).mean(1).max() < 2


@needs_dali
@pytest.mark.parametrize("name", EVALUATIONS)
def test_host_and_dali_evaluate_real_photographs_alike(real, name):
    host, dali = (evaluated(real, EVALUATIONS[name], backend) for backend in ("host", "dali"))
    difference = (host - dali).abs().flatten(1).mean(1)
    assert difference.mean() < 1
    assert difference.max() < 2


@needs_dali
@pytest.mark.parametrize(
    "transform",
    [natural_train(224), bit_train(160, 128), bit_train(512, 480), xray_train(224), natural_train(96, (2, 9))],
    ids=["natural", "bit small", "bit large", "xray", "randaugment"],
)
def test_host_and_dali_train_on_the_same_pictures(photos, transform):
    host, dali = (trained(photos, transform, backend) for backend in ("host", "dali"))
    difference = (host - dali).abs().flatten(1).mean(1)
    assert difference.mean() < 2
    assert difference.median() < 1.5
    assert (host.mean() - dali.mean()).abs() < 0.5


TRAINED = {
    "natural": natural_train(224),
    "enlarged": natural_train(384),
    "strong": natural_train(96, (2, 9)),
    "tiny windows": replace(natural_train(64), scale=(0.001, 0.05), ratio=(0.2, 5)),
    "crop": bit_train(160, 128),
    "odd crop": bit_train(97, 31),
    "xray": xray_train(224),
    "xray, still": replace(xray_train(131), affine=None),
    "none": natural_eval(224),
    "area": replace(natural_train(160), downscale="area"),
    "short crop": replace(natural_eval(160), kind="random_short_crop"),
}


@needs_dali
@pytest.mark.parametrize("name", TRAINED)
def test_decoding_the_window_or_cutting_it_from_the_whole_gives_the_same_pixels(real, name):
    """Which of them runs depends on where images are decoded: on a GPU whole ones are. No level may differ by it."""
    whole, window = (trained(real, TRAINED[name], "dali", steps=3, region=region) for region in ("whole", "slice"))
    assert (whole - window).abs().max() < 1.01
    if name == "natural":
        assert torch.equal(window, trained(real, TRAINED[name], "dali", steps=3))  # what `auto` takes on a CPU


@needs_dali
def test_windows_of_16_bits_and_of_images_on_their_side_are_the_same_either_way(tmp_path):
    turned = [Image.Exif() for _ in range(8)]
    for number, exif in enumerate(turned):
        exif[0x0112] = number + 1
    files = [encoded(photo(i, 50 + 9 * i, 120), exif=exif, quality=95) for i, exif in enumerate(turned)]
    deep = [encoded(Image.fromarray(gray16(i, 60, 90 + i)), "PNG") for i in range(8)]
    for number, some in enumerate((files, deep, files + deep)):
        checked = [check_image(data) for data in some]
        pack = pack_of(tmp_path / f"{number}.h5", [(c.data, c.height, c.width) for c in checked])
        for transform in (natural_train(48), xray_train(48)):
            whole, window = (trained(pack, transform, "dali", 2, region=region) for region in ("whole", "slice"))
            assert (whole - window).abs().max() < 1.01


@needs_dali
@pytest.mark.gpu
def test_a_gpu_decodes_and_augments_alike(photos):
    for transform in EVALUATIONS.values():
        difference = (evaluated(photos, transform, "dali", "cuda") - evaluated(photos, transform, "dali")).abs()
        assert difference.flatten(1).mean(1).max() < 2
    published = replace(xray_train(224), affine=Affine(translate=0.25, outside="reflect"), downscale="area")
    for transform in (natural_train(224), natural_train(96, (2, 9)), bit_train(160, 128), xray_train(224), published):
        gpu = trained(photos, transform, "dali", device="cuda")
        assert (gpu - trained(photos, transform, "dali")).abs().mean() < 2
        assert torch.equal(gpu, trained(photos, transform, "dali", device="cuda"))


@needs_dali
@pytest.mark.parametrize("number", range(len(RANDAUGMENT_OPS)), ids=RANDAUGMENT_OPS)
@pytest.mark.parametrize("sign", [0, 1])
def test_each_operation_of_randaugment_is_the_same_on_both(photos, monkeypatch, number, sign):
    def chosen(transform, draws):
        return np.tile(np.array([[number, sign]], dtype=np.int32), (len(draws), 1, 1))

    monkeypatch.setattr("loaders.pipelines.request.randaugment_choices", chosen)
    transform = natural_train(64, (1, 9))
    host, dali = (trained(photos, transform, backend, steps=1) for backend in ("host", "dali"))
    plain = trained(photos, natural_train(64), "host", steps=1)
    assert (host - dali).abs().mean() < 2.5
    changed = (host - plain).abs().mean()
    assert (changed == 0) == (RANDAUGMENT_OPS[number] == "identity")


def areas_and_aspects(transform, size, seed, n=4000):
    boxes = windows(transform, np.tile(size, (n, 1)), step_draws(seed, 0, 0, n))
    return boxes[:, 2] * boxes[:, 3] / (size[0] * size[1]), boxes[:, 3] / boxes[:, 2], boxes


def ks(one, other):
    return stats.ks_2samp(one, other).pvalue


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (64, 64)])
def test_random_crops_are_distributed_as_torchvisions(size):
    area, aspect, boxes = areas_and_aspects(natural_train(), size, 1)
    torch.manual_seed(1)
    image = torch.empty(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
    assert ks(area, theirs[:, 2] * theirs[:, 3] / (size[0] * size[1])) > 1e-3
    assert ks(aspect, theirs[:, 3] / theirs[:, 2]) > 1e-3
    assert ks(boxes[:, 0], theirs[:, 0]) > 1e-3
    assert ks(boxes[:, 1], theirs[:, 1]) > 1e-3


@needs_dali
@pytest.mark.parametrize("size", [(375, 500), (500, 333)])
def test_random_crops_are_distributed_as_dalis(size):
    """Histograms of area and aspect of the crops that DALI's own generator draws."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1000, num_threads=1, device_id=None, seed=3)
    def crops():
        shapes = fn.external_source(lambda: [np.array([*size, 3], dtype=np.int64)] * 1000, batch=True)
        anchor, shape = fn.random_crop_generator(shapes, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        return anchor, shape

    pipeline = crops()
    pipeline.build()
    shape = np.concatenate([pipeline.run()[1].as_array() for _ in range(4)])
    area, aspect, _ = areas_and_aspects(natural_train(), size, 4)
    bins = 12
    for ours, theirs in (
        (area, shape[:, 0] * shape[:, 1] / (size[0] * size[1])),
        (np.log(aspect), np.log(shape[:, 1] / shape[:, 0])),
    ):
        edges = np.quantile(np.concatenate([ours, theirs]), np.linspace(0, 1, bins + 1))
        table = [np.histogram(values, np.unique(edges))[0] for values in (ours, theirs)]
        assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_windows_lie_within_any_image(kind):
    sizes = np.random.default_rng(0).integers(1, 600, (3000, 2))
    sizes[:4] = [[1, 1], [1, 900], [900, 1], [2, 3]]
    transform = Transform(kind, 32, resize=40 if kind.endswith("_crop") and kind != "random_resized_crop" else None)
    for draws in (step_draws(0, 0, 0, 3000), np.zeros((3000, DRAWS)), np.full((3000, DRAWS), 1 - 2**-53)):
        box = windows(transform, sizes, draws)
        assert (box[:, :2] >= 0).all()
        assert (box[:, 2:] > 0).all()
        assert (box[:, :2] + box[:, 2:] <= sizes + 1e-9).all()
        part = regions(transform, box, sizes)
        assert (part[:, :2] >= 0).all()
        assert (part[:, 2:] >= 1).all()
        assert (part[:, :2] + part[:, 2:] <= sizes).all()


@pytest.mark.parametrize("resize,crop", [(160, 128), (512, 480)])
def test_bit_crops_reach_every_place_equally(resize, crop):
    box = windows(bit_train(resize, crop), np.tile([resize, resize], (20_000, 1)), step_draws(5, 0, 0, 20_000))
    for axis in (0, 1):
        counts = np.bincount(box[:, axis].astype(int), minlength=resize - crop + 1)
        assert len(counts) == resize - crop + 1
        assert stats.chisquare(counts).pvalue > 1e-4


def test_xray_matrices_are_the_inverse_of_torchvisions():
    """Points of a similarity about the centre: torchvision's forward map, then ours, is the identity."""
    transform = replace(xray_train(100), affine=Affine(30, (0.8, 1.2), 0.2))
    draws = step_draws(1, 0, 0, 50)
    found = matrices(transform, draws)
    for matrix, row in zip(found, draws, strict=True):
        angle, scale = math.radians((2 * row[23] - 1) * 30), 0.8 + 0.4 * row[24]
        shift = (2 * row[25:27] - 1) * 20
        point = np.array([12.0, 71.0]) - 50
        turned = scale * np.array(
            [point[0] * math.cos(angle) - point[1] * math.sin(angle),
             point[0] * math.sin(angle) + point[1] * math.cos(angle)]
        )  # fmt: skip
        back = matrix @ np.array([*(turned + 50 + shift), 1])
        np.testing.assert_allclose(back, [12, 71], atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_x_rays_are_one_channel_repeated_and_normalized_each_by_its_own(photos, backend):
    """Also of colour pictures, and with statistics that differ between the channels."""
    mean, std = (0.1, 0.4, 0.7), (0.2, 0.3, 0.4)
    for transform in (xray_eval(64), xray_train(64)):
        plan = TrainPlan(np.arange(len(photos)), global_batch=16, seed=2)
        batches = train_batches(photos, plan, replace(transform, mean=mean, std=std), last_step=1, backend=backend)
        ((batch,),) = list(batches)
        assert batch.images.shape == (16, 3, 64, 64)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        values = batch.images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        torch.testing.assert_close(values[:, 0], values[:, 1], atol=1e-6, rtol=0)
        torch.testing.assert_close(values[:, 0], values[:, 2], atol=1e-6, rtol=0)
        assert values.amax() > 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_xray_training_turns_pictures_as_torchvision_does(photos, backend):
    transform = replace(xray_train(96), flip=False)
    found = trained(photos, transform, backend, steps=1)
    plan = TrainPlan(np.arange(len(photos)), global_batch=16, seed=2)
    (part,) = plan.step(0)
    still = evaluated(photos, xray_eval(96), backend)
    inner = slice(36, 60)  # what lies inside for every angle and shift
    for picture, record, row in zip(found, part.ids, part.draws, strict=True):
        expected = reference.affine(
            still[record], angle=float((2 * row[23] - 1) * 45), scale=float(0.9 + 0.2 * row[24]), shear=[0.0],
            translate=[0, 0], interpolation=InterpolationMode.BILINEAR,
        )  # fmt: skip
        dx, dy = np.rint((2 * row[25:27] - 1) * 0.15 * 96).astype(int)  # torchvision shifts by whole pixels
        moved = torch.roll(expected, (int(dy), int(dx)), (1, 2))
        assert (picture[:, inner, inner] - moved[:, inner, inner]).abs().mean() < 6


def test_operations_and_flips_are_drawn_equally():
    transform = natural_train(randaugment=(2, 9))
    choices = randaugment_choices(transform, step_draws(3, 0, 0, 20_000))
    assert choices.shape == (20_000, 2, 2)
    for k in range(2):
        pairs = np.bincount(2 * choices[:, k, 0] + choices[:, k, 1], minlength=28)
        assert stats.chisquare(pairs).pvalue > 1e-4


@needs_dali
def test_awkward_files_look_the_same_on_both(tmp_path):
    """After packing: progressive, CMYK, gray, palette, transparent, one bit, lying on its side, 16 bits."""
    base = photo(3, 60, 90)
    sideways = Image.Exif()
    sideways[0x0112] = 8
    files = [
        encoded(base, progressive=True), encoded(base.convert("CMYK")), encoded(base.convert("L")),
        encoded(base.convert("P"), "PNG"), encoded(base.convert("RGBA"), "PNG"), encoded(base.convert("LA"), "PNG"),
        encoded(base.convert("1"), "PNG"), encoded(base, exif=sideways), deep_png(base), encoded(base, "GIF"),
        encoded(Image.fromarray(gray16(3, 60, 90)), "PNG"),
    ]  # fmt: skip
    checked = [check_image(data) for data in files]
    pack = pack_of(tmp_path / "p.h5", [(c.data, c.height, c.width) for c in checked])
    host, dali = (evaluated(pack, natural_eval(48), backend) for backend in ("host", "dali"))
    assert (host - dali).abs().flatten(1).mean(1).max() < 2


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "zoom"}, {"size": 0}, {"resize": 31}, {"scale": (0.5, 0.1)}, {"scale": (0.0, 0.1)}, {"ratio": (2.0, 1.0)},
     {"ratio": (0.0, 1.0)}, {"randaugment": (0, 9)}, {"randaugment": (7, 9)}, {"randaugment": (2, -1)},
     {"randaugment": (2, 31)}],
)  # fmt: skip
def test_transforms_that_cannot_be_are_refused(wrong):
    with pytest.raises(UserError):
        Transform(**{"kind": "random_crop", "size": 32, **wrong})


@pytest.mark.parametrize(
    "right",
    [{"size": 1}, {"resize": 32}, {"scale": (0.3, 0.3)}, {"ratio": (2.0, 2.0)}, {"randaugment": (1, 0)},
     {"randaugment": (6, 30)}],
)  # fmt: skip
def test_transforms_at_the_ends_of_their_ranges_are_taken(right):
    Transform(**{"kind": "random_crop", "size": 32, **right})


def test_the_constants_are_those_of_imagenet():
    assert (IMAGENET_MEAN, IMAGENET_STD) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


@pytest.mark.parametrize(
    "transform,random",
    [
        (Transform("center_crop", 8, resize=10), False),
        (Transform("resize", 8), False),
        (Transform("resize", 8, flip=True), True),
        (Transform("random_crop", 8, resize=10), True),
        (natural_train(8), True),
        (natural_eval(8), False),
        (xray_train(8), True),
        (xray_eval(8), False),
    ],
)
def test_what_draws_nothing_is_the_same_each_time(transform, random):
    assert transform.random == random


def test_random_windows_reach_the_last_pixel():
    draws = step_draws(0, 0, 0, 2000)
    for at in (0, 1 - 2**-53):
        draws[:, 20:22] = at  # their places
        box = windows(natural_train(8), np.full((2000, 2), 100), draws)
        smaller = (box[:, 2:] < 100).all(1)
        assert smaller.sum() > 1000
        edge = box[smaller, :2] + (box[smaller, 2:] if at else 0)
        assert (edge == (100 if at else 0)).all()
