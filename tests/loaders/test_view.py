import numpy as np
import pytest
from PIL import Image

from loaders import pack, view
from loaders.packs.shard import Pack
from loaders.pipelines.sheet import contact_sheet
from tests.support.pictures import folder, photo


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("view")
    folder(root / "images", height=64, width=64)
    assert pack.main([str(root / "images"), str(root / "p.h5"), "--workers", "0"]) == 0
    return root / "p.h5"


@pytest.mark.parametrize("transform", view.TRANSFORMS)
def test_a_sheet_of_every_transform(packed, tmp_path, transform, capsys):
    out = tmp_path / "sheet.png"
    words = ["--out", str(out), "--transform", transform, "--size", "48", "--columns", "5", "--backend", "host"]
    assert view.main([str(packed), *words]) == 0
    assert str(out) in capsys.readouterr().out
    sheet = np.asarray(Image.open(out).convert("RGB"))
    assert sheet.shape == (3 * (48 + 34) + 6, 5 * (48 + 6) + 6, 3)  # 12 samples in rows of 5
    assert (sheet[:, :, 0] < 50).any()  # text


def test_samples_are_shown_as_they_are_with_their_own_label(packed, tmp_path):
    sheet = contact_sheet(
        Pack.open(packed), view.TRANSFORMS["bit-eval"](64), count=4, columns=2, seed=0, backend="host"
    )
    first = np.asarray(sheet.crop((6, 6, 70, 70)), float)
    assert np.abs(first - np.asarray(photo(0, 64, 64), float)).mean() < 4  # bird/0.jpg


def test_what_cannot_be_shown(packed, tmp_path, capsys):
    for words in (["absent.h5"], [str(packed), "--count", "0"], [str(packed), "--size", "0"]):
        assert view.main(words) == 2
        assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(("size", "before"), [(128, 160), (480, 600), (224, 280), (1, 1)])
def test_the_crop_of_bit_training_is_shown_as_the_protocol_has_it_for_small_images(size, before):
    """Resize to 160, crop 128 (arXiv 1912.11370, section 3.3), in proportion for other sizes."""
    transform = view.TRANSFORMS["bit-train"](size)
    assert (transform.size, transform.before_crop) == (size, before)
