"""The Oxford-IIIT Pet dataset as it is distributed: https://www.robots.ox.ac.uk/~vgg/data/pets/."""

from pathlib import Path

from loaders.errors import UserError
from loaders.sources.classes import check_class_numbers
from loaders.sources.listing import Listing, TableBuilder, file_in_folder
from loaders.sources.names import as_text

KIND = "pets"
HELP = "a folder with images/ and annotations/ (trainval.txt, test.txt); --under trainval or test takes a part"
_PARTS = ("trainval", "test")


def accepts(source: str) -> bool:
    return all(Path(source, "annotations", f"{part}.txt").is_file() for part in _PARTS)


def listing(source: str, under: str | None = None) -> Listing:
    if not accepts(source) or not Path(source, "images").is_dir():
        raise UserError(f"{source} is not the Oxford-IIIT Pet dataset: expected {HELP}")
    if under and under not in _PARTS:
        raise UserError(f"the Pet dataset has no part {under!r}; --under may be {' or '.join(_PARTS)}")
    builder = TableBuilder(file_in_folder)
    names: dict[int, str] = {}
    for part in [under] if under else _PARTS:
        path = Path(source, "annotations", f"{part}.txt")
        for row, line in enumerate(path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), 1):
            words = line.split()
            if not words or line.startswith("#"):
                continue
            if len(words) < 2 or not words[1].isdecimal():
                raise UserError(f"{path}, line {row}: expected IMAGE CLASS SPECIES BREED, found {line!r}")
            label = int(words[1]) - 1
            check_class_numbers([label], f"{path}, line {row}, counted from 0")
            breed = words[0].rpartition("_")[0]
            if names.setdefault(label, breed) != breed:
                raise UserError(f"{path}, line {row}: class {label + 1} is {breed} here and {names[label]} elsewhere")
            builder.add(as_text(f"images/{words[0]}.jpg"), label, str(Path(source, "images")))
    if not len(builder):
        raise UserError(f"{source}: its lists in annotations/ are empty")
    return Listing(builder.table(), tuple(as_text(names.get(k, str(k + 1))) for k in range(max(names) + 1)))
