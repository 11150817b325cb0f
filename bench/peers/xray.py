"""The X-ray transform beside the loader that X-ray research uses: torchxrayvision's dataset in a torch DataLoader."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.peers.loaders import AHEAD, SIZE, Material

NAME = "torchxrayvision DataLoader"


def torchxrayvision_loader(material: Material) -> Iterator:
    """NIH_Dataset with a worker process per thread: centre square, 224 pixels, and its documented augmentation.

    The same ranges as ours: rotation 45°, translation 15%, scale 0.9 to 1.1, and a flip, as the paper added one.
    """
    import torchxrayvision as xrv
    from torchvision import transforms

    augment = transforms.Compose(
        [
            xrv.datasets.ToPILImage(),
            transforms.RandomAffine(45, translate=(0.15, 0.15), scale=(0.9, 1.1)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    dataset = xrv.datasets.NIH_Dataset(
        str(material.images),
        csvpath=str(_label_file(material)),
        unique_patients=False,
        transform=transforms.Compose([xrv.datasets.XRayCenterCrop(), xrv.datasets.XRayResizer(SIZE)]),
        data_aug=augment,
    )
    how: dict[str, Any] = {"num_workers": material.threads, "prefetch_factor": AHEAD, "drop_last": True}
    while True:
        for batch in torch.utils.data.DataLoader(dataset, material.batch, shuffle=True, **how):
            yield (batch["img"] / 1024).expand(-1, 3, -1, -1).contiguous()  # from its -1024..1024, three channels


def _label_file(material: Material) -> Path:
    """The images as if they were of NIH, each of a patient of its own."""
    files = sorted(path.relative_to(material.images).as_posix() for path in material.images.glob("*/*"))
    rows = [f"{file},No Finding,{k},50,M,PA" for k, file in enumerate(files)]
    path = material.folder / "labels.csv"
    head = "Image Index,Finding Labels,Patient ID,Patient Age,Patient Gender,View Position"
    path.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return path
