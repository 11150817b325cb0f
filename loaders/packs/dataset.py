"""A pack as a map-style dataset: what `torch.utils.data.DataLoader` takes, and any program that asks by number."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from loaders.errors import UserError, reason
from loaders.packs.shard import Pack


class PackDataset:
    """Item i: the image i, as `transform` makes it, and its label.

    transform: of a PIL image in RGB, as displayed, 8 bits a channel: gray of 16 is rounded to them, which the engine's
    own pipelines do not do. None: that image. The label is an int, or a vector (L,) float32 with NaN for unknown.
    Processes of a `DataLoader` share the pages of the file, whether they are forked or spawned.
    """

    def __init__(self, pack: Pack, transform: Callable[[Image.Image], Any] | None = None):
        self.pack, self.transform = pack, transform

    def __len__(self) -> int:
        return len(self.pack)

    def __getitem__(self, i: int) -> tuple[Any, int | np.ndarray]:
        """IndexError out of range, UserError for a record that does not decode."""
        image, label = self._image(i), self.pack.labels[i]
        found = int(label) if np.ndim(label) == 0 else np.array(label)
        return (image if self.transform is None else self.transform(image)), found

    def _image(self, i: int) -> Image.Image:
        data = self.pack.record(i)
        try:
            with Image.open(BytesIO(data.data)) as opened:
                image = ImageOps.exif_transpose(opened)
                if image.mode.startswith("I"):  # gray of 16 bits, which `convert` would cut off at 255
                    image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
                return image.convert("RGB")
        except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them to
            raise UserError(
                f"{self.pack.path}: record {i} ({self.pack.keys[i]}) does not decode: {reason(error)}; others that do "
                f"not are named by: python -m loaders.pack verify {self.pack.path}"
            ) from error
