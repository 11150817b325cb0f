"""The 1,797 real handwritten digits that come with scikit-learn: 8×8 pixels, gray, as lossless PNG."""

from io import BytesIO

import numpy as np
from PIL import Image

from loaders.errors import UserError
from loaders.sources.listing import Bytes, Item, Listing

KIND = "sklearn"
HELP = "sklearn:digits, the 1,797 digit images in scikit-learn"


def accepts(source: str) -> bool:
    return source == "sklearn:digits"


def listing(source: str, under: str | None = None) -> Listing:
    if not accepts(source) or under:
        raise UserError(f"the only source of kind {KIND} is sklearn:digits, and it has no sub-trees")
    try:
        from sklearn.datasets import load_digits  # slow to import, and only this source needs it
    except ImportError as error:
        raise UserError("sklearn:digits needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    items = []
    for number, (image, label) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
        pixels = np.rint(image * (255 / 16)).astype(np.uint8)  # stored as 0..16
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        items.append(Item(f"{label}/{number:04d}.png", Bytes(buffer.getvalue()), label))
    names = tuple(str(name) for name in digits.target_names)
    return Listing(sorted(items, key=lambda item: item.key), names)
