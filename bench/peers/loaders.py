"""Endless streams of training batches (random resized crop to 224, flip, normalized floats) by one loader each."""

import importlib.util
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.utils.dlpack

from loaders import packing
from loaders.packs.shard import Pack
from loaders.pipelines.batches import train_batches
from loaders.pipelines.order import TrainPlan
from loaders.pipelines.reading import Reading, chosen
from loaders.pipelines.request import request
from loaders.pipelines.transform import IMAGENET_MEAN, IMAGENET_STD, Transform

SIZE = 224
AHEAD = 2  # batches that every loader may prepare
_SHARDS = 8  # tars for WebDataset: some for every worker


@dataclass(frozen=True)
class Material:
    """The same images in everyone's form."""

    folder: Path
    pack: Path
    batch: int
    threads: int
    transform: Transform
    device: str = "cpu"
    """Where every loader's images end up."""
    decode: str = "auto"
    """Where ours are decoded."""

    @property
    def images(self) -> Path:
        return self.folder / "images"


def prepare(source: str, folder: Path, short_side: int | None, quality: int, **how: Any) -> Material:
    """Pack the source, and give the others the packed bytes in their own form; `how`: further fields of Material."""
    path = folder / "images.h5"
    packing.pack(source, path, packing.Options(resize=short_side, quality=quality), quiet=True)
    material, opened = Material(folder, path, **how), Pack.open(path)
    tars = [tarfile.open(folder / f"{k:04d}.tar", "w") for k in range(_SHARDS)]  # noqa: SIM115  closed below
    for i in range(len(opened)):
        data, name = opened.record(i).tobytes(), f"{opened.labels[i]:05d}/{i:06d}.jpg"
        (material.images / name).parent.mkdir(parents=True, exist_ok=True)
        (material.images / name).write_bytes(data)
        label = folder / "label.cls"
        label.write_text(str(opened.labels[i]), encoding="utf-8")
        tars[i % _SHARDS].add(material.images / name, f"{i:06d}.jpg")
        tars[i % _SHARDS].add(label, f"{i:06d}.cls")
    for tar in tars:
        tar.close()
    if _has("ffcv"):
        _write_ffcv(material, quality)
    if _has("streaming"):
        _write_streaming(material, opened)
    return material


def loaders() -> dict[str, Callable[[Material], Iterator]]:
    """Those that run here, by name."""
    found: dict[str, Callable[[Material], Iterator]] = {"torchvision DataLoader": torchvision_loader}
    if _has("nvidia.dali"):
        dali = {"DALI graph fed from memory": from_memory, "pack, DALI": from_pack, "DALI file reader": dali_files}
        found = {**dali, **found}
    found["pack, host pipeline"] = from_pack_on_host
    for name, module, loader in (
        ("WebDataset", "webdataset", webdataset),
        ("FFCV", "ffcv", ffcv),
        ("streaming", "streaming", streaming),
    ):
        if _has(module):
            found[name] = loader
    return found


def versions() -> dict[str, str]:
    """Of the packages that are compared, where they are installed."""
    found = {}
    for name in ("torchvision", "pillow", "numpy", "webdataset", "ffcv", "mosaicml-streaming", "torchxrayvision"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _has(module: str) -> bool:
    parent = module.rpartition(".")[0]
    return (not parent or _has(parent)) and importlib.util.find_spec(module) is not None


def _plan(material: Material) -> tuple[Pack, TrainPlan]:
    pack = Pack.open(material.pack)
    return pack, TrainPlan(np.arange(len(pack)), material.batch, seed=1)


def from_pack(material: Material) -> Iterator:
    """Ours."""
    yield from _ours(material, "dali")


def from_pack_on_host(material: Material) -> Iterator:
    """Ours without DALI."""
    yield from _ours(material, "host")


def _ours(material: Material, backend: str) -> Iterator:
    pack, plan = _plan(material)
    how: dict[str, Any] = {"backend": backend, "threads": material.threads, "prefetch": AHEAD}
    decode = material.decode if backend == "dali" else "auto"
    how |= {"device": material.device, "decode": decode}
    with train_batches(pack, plan, material.transform, **how) as batches:
        yield from (step[0].images for step in batches)


class _Memory:
    """The records of a pack as arrays in memory."""

    def __init__(self, pack: Pack):
        self.bits = pack.bits
        self._arrays = [pack.record(i).copy() for i in range(len(pack))]

    def records(self, ids: np.ndarray) -> list[np.ndarray]:
        return [self._arrays[i] for i in ids.tolist()]


def from_memory(material: Material) -> Iterator:
    """The ceiling: the same DALI graph, with images in memory and every number computed beforehand."""
    from loaders.pipelines.dali import DaliPipeline

    pack, plan = _plan(material)
    steps = [plan.step(number)[0] for number in range(2 * len(pack) // material.batch + 1)]
    ready = [request(pack, material.transform, part.ids, part.draws) for part in steps]
    endless = (one for _ in iter(int, 1) for one in ready)
    where: dict[str, Any] = {"device": material.device, "decode": material.decode}
    how = chosen(Reading(backend="dali", threads=material.threads, prefetch=AHEAD, **where))
    memory = cast(Pack, _Memory(pack))
    with closing(DaliPipeline(memory, material.transform, endless, material.batch, how)) as pipeline:
        while True:
            yield pipeline.next_images()


def dali_files(material: Material) -> Iterator:
    """DALI as its own examples use it: file reader, random crop fused with decoding, resize, mirror, normalize."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(
        batch_size=material.batch,
        num_threads=material.threads,
        device_id=None,
        prefetch_queue_depth=AHEAD,
        exec_dynamic=True,
        seed=1,
    )
    def graph() -> Any:
        data, labels = fn.readers.file(file_root=str(material.images), random_shuffle=True, name="files")
        images = fn.decoders.image_random_crop(data, output_type=types.RGB, random_area=[0.08, 1.0])
        images = fn.resize(images, size=(SIZE, SIZE), interp_type=types.INTERP_LINEAR, antialias=True)
        mean, std = ([255 * v for v in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
        mirror = fn.random.coin_flip()
        return (
            fn.crop_mirror_normalize(images, mirror=mirror, dtype=types.FLOAT, output_layout="HWC", mean=mean, std=std),
            labels,
        )

    pipeline = graph()
    pipeline.build()
    while True:
        images, labels = pipeline.run()
        yield torch.utils.dlpack.from_dlpack(images.as_tensor())


def _torchvision_transform() -> Callable:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def torchvision_loader(material: Material) -> Iterator:
    """ImageFolder and DataLoader with a worker process per thread."""
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(material.images), _torchvision_transform())
    how: dict[str, Any] = {"num_workers": material.threads, "prefetch_factor": AHEAD, "drop_last": True}
    while True:
        yield from (images for images, _ in torch.utils.data.DataLoader(dataset, material.batch, shuffle=True, **how))


def webdataset(material: Material) -> Iterator:
    """WebDataset with a worker process per thread."""
    import webdataset as wds

    transform = _torchvision_transform()
    shards = [str(material.folder / f"{k:04d}.tar") for k in range(_SHARDS)]
    dataset = (
        wds.WebDataset(shards, resampled=True, shardshuffle=False)
        .shuffle(200)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(lambda image: transform(image.convert("RGB")), int)
        .batched(material.batch)
    )
    yield from (
        images for images, _ in wds.WebLoader(dataset, batch_size=None, num_workers=material.threads, prefetch_factor=2)
    )


def _write_ffcv(material: Material, quality: int) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=quality), "label": IntField()}
    dataset = ImageFolder(str(material.images))
    DatasetWriter(str(material.folder / "images.beton"), fields, num_workers=material.threads).from_indexed_dataset(
        dataset
    )


def ffcv(material: Material) -> Iterator:
    """FFCV on its own file, into which it has encoded the images anew."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    mean, std = (255 * np.array(values) for values in (IMAGENET_MEAN, IMAGENET_STD))
    images = [
        RandomResizedCropRGBImageDecoder((SIZE, SIZE)),
        RandomHorizontalFlip(),
        NormalizeImage(mean, std, np.float32),
        ToTensor(),
        ToTorchImage(),
    ]
    loader = Loader(
        str(material.folder / "images.beton"),
        batch_size=material.batch,
        num_workers=material.threads,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        batches_ahead=AHEAD,
        pipelines={"image": images, "label": None},
    )
    while True:
        yield from (batch[0] for batch in loader)


def _write_streaming(material: Material, pack: Pack) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(material.folder / "mds"), columns={"image": "bytes", "label": "int"}) as out:
        for i in range(len(pack)):
            out.write({"image": pack.record(i).tobytes(), "label": int(pack.labels[i])})


def streaming(material: Material) -> Iterator:
    """MosaicML streaming from local shards, with a worker process per thread."""
    import io

    from PIL import Image
    from streaming import StreamingDataset

    transform = _torchvision_transform()

    class Images(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            with Image.open(io.BytesIO(super().__getitem__(at)["image"])) as image:
                return transform(image.convert("RGB"))

    dataset = Images(local=str(material.folder / "mds"), shuffle=True, batch_size=material.batch)
    how: dict[str, Any] = {"num_workers": material.threads, "prefetch_factor": AHEAD, "drop_last": True}
    while True:
        yield from torch.utils.data.DataLoader(dataset, material.batch, **how)
