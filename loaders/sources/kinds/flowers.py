"""Oxford Flowers-102 as it is distributed: https://www.robots.ox.ac.uk/~vgg/data/flowers/102/."""

from pathlib import Path

import numpy as np

from loaders.errors import UserError, reading
from loaders.sources.classes import check_class_numbers
from loaders.sources.listing import Listing, TableBuilder, file_in_folder
from loaders.sources.wire.mat import arrays

KIND = "flowers102"
HELP = (
    "a folder with jpg/, imagelabels.mat and setid.mat; --under train, val, trainval or test takes an official part, "
    "published-train or published-test a side of the split of arXiv 2106.00116"
)
# The published runs trained on the official test part (6,149 images) and tested on the other two (2,040): all their
# accuracies are multiples of 1/2,040.
_PARTS = {
    "train": ("trnid",),
    "val": ("valid",),
    "trainval": ("trnid", "valid"),
    "test": ("tstid",),
    "published-train": ("tstid",),
    "published-test": ("trnid", "valid"),
}
_ALL = ("trnid", "valid", "tstid")


def accepts(source: str) -> bool:
    return all(Path(source, name).is_file() for name in ("imagelabels.mat", "setid.mat"))


def listing(source: str, under: str | None = None) -> Listing:
    if not accepts(source) or not Path(source, "jpg").is_dir():
        raise UserError(f"{source} is not Flowers-102: expected {HELP}; unpack 102flowers.tgz there")
    if under and under not in _PARTS:
        raise UserError(f"Flowers-102 has no part {under!r}; --under may be {', '.join(_PARTS)}")
    with reading(f"{source}, imagelabels.mat or setid.mat", "the lists of Flowers-102", "download them again"):
        labels = arrays(Path(source, "imagelabels.mat").read_bytes())["labels"].ravel().astype(int)
        sets = arrays(Path(source, "setid.mat").read_bytes())
        wanted = np.concatenate([sets[name].ravel().astype(int) for name in (_PARTS[under] if under else _ALL)])
    if not len(wanted):
        raise UserError(f"{source}: setid.mat names no image" + (f" of {under}" if under else ""))
    if wanted.min() < 1 or wanted.max() > len(labels):
        raise UserError(
            f"{source}: setid.mat names images {wanted.min()} to {wanted.max()}; imagelabels.mat has labels of 1 to"
            f" {len(labels)}"
        )
    check_class_numbers((labels - 1).tolist(), source)
    builder = TableBuilder(file_in_folder)
    for number in wanted.tolist():
        builder.add(f"jpg/image_{number:05d}.jpg", int(labels[number - 1]) - 1, str(Path(source, "jpg")))
    return Listing(builder.table(), tuple(str(k) for k in range(1, labels.max() + 1)))
