import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, ToTensor

from loaders.errors import UserError
from loaders.packs import Pack, PackDataset, Record, ShardWriter, new_attributes
from tests.support import packing, pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("dataset")
    pictures.folder(place / "images", per_class=5)
    assert packing.run(place / "images", place / "images.h5", "--workers", "0") == 0
    return place


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_what_torchvision_gives_of_the_folder(folder, workers):
    prepare = Compose([CenterCrop(24), ToTensor()])
    ours = DataLoader(PackDataset(Pack.open(folder / "images.h5"), prepare), batch_size=4, num_workers=workers)
    theirs = DataLoader(ImageFolder(folder / "images", prepare), batch_size=4)
    assert len(ours) == len(theirs) == 4
    for (images, labels), (expected, classes) in zip(ours, theirs, strict=True):
        assert torch.equal(images, expected) and torch.equal(labels, classes)


def test_it_travels_to_another_process_and_ends_where_the_pack_does(folder):
    dataset = pickle.loads(pickle.dumps(PackDataset(Pack.open(folder / "images.h5"))))
    assert len(dataset) == 15 and len(list(dataset)) == 15
    image, label = dataset[-1]
    assert (image.mode, image.size, label) == ("RGB", (60, 40), 2) and type(label) is int
    with pytest.raises(IndexError):
        dataset[15]


def written(tmp_path, records, names=("a", "b")):
    (attributes,) = new_attributes({"source": "made up", "kind": "test"}, 1)
    with ShardWriter(tmp_path / "made.h5", list(names), attributes) as writer:
        for record in records:
            writer.add(record)
        writer.finish()
        writer.publish()
    return PackDataset(Pack.open(tmp_path / "made.h5"))


def test_gray_of_16_bits_is_rounded_not_cut_off(tmp_path):
    deep = pictures.gray16(3)
    data = pictures.encoded(Image.fromarray(deep), "PNG")
    image, _ = written(tmp_path, [Record(data, "deep", 1, 40, 60)])[0]
    assert np.array_equal(np.asarray(image)[..., 1], np.rint(deep / 257))


def test_images_are_turned_as_they_are_displayed(tmp_path):
    picture = pictures.photo(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    image, _ = written(tmp_path, [Record(pictures.encoded(picture, "PNG", exif=exif), "turned", 0, 60, 40)])[0]
    assert np.array_equal(np.asarray(image), np.rot90(np.asarray(picture), -1))


def test_vectors_of_labels_keep_what_is_unknown(tmp_path):
    data = pictures.encoded(pictures.photo(1), "PNG")
    dataset = written(tmp_path, [Record(data, "one", [1.0, float("nan")], 40, 60)])
    _, label = dataset[0]
    assert label.dtype == np.float32 and np.array_equal(label, [1, np.nan], equal_nan=True)
    label[0] = 5  # it is the caller's own
    assert dataset.pack.labels[0, 0] == 1


def test_a_damaged_record_is_named(tmp_path):
    dataset = written(tmp_path, [Record(pictures.encoded(pictures.photo(1), "PNG")[:200], "torn", 1, 40, 60)])
    with pytest.raises(UserError, match=r"made.h5: record 0 \(torn\) does not decode.*loaders.pack verify"):
        dataset[0]
