import importlib.util

import numpy as np
import pytest
from PIL import Image

from loaders.pipelines.heading import fault
from tests.fuzz import decoding
from tests.support.pictures import encoded, gray16, photo

SOUND = {
    "baseline": encoded(photo(1)),
    "progressive": encoded(photo(1), progressive=True),
    "gray": encoded(photo(1, mode="L")),
    "subsampled": encoded(photo(1), subsampling=2, restart_marker_blocks=2),
    "with a profile and a comment": encoded(photo(1), icc_profile=b"p" * 70_000, comment=b"c", exif=b"Exif\0\0II*\0"),
    "with padding after its end": encoded(photo(1)) + bytes(100),
    "with another picture after it": encoded(photo(1)) + encoded(photo(2, 20, 20)),
    "PNG": encoded(photo(1), "PNG"),
    "palette": encoded(photo(1).quantize(16), "PNG"),
    "with transparency": encoded(photo(1, mode="RGBA"), "PNG"),
    "16 bits": encoded(Image.fromarray(gray16(1)), "PNG"),
    "1 bit": encoded(photo(1).convert("1"), "PNG"),
    "PNG with padding": encoded(photo(1), "PNG") + bytes(7),
}


def look(data, height=40, width=60):
    return fault(np.frombuffer(data, np.uint8), height, width)


@pytest.mark.parametrize("name", SOUND)
def test_what_decodes_passes(name):
    assert look(SOUND[name]) is None
    assert look(SOUND[name], 60, 40) is None  # turned by EXIF


@pytest.mark.parametrize("kind", ["baseline", "PNG"])
def test_what_is_no_image_is_named(kind):
    data = SOUND[kind]
    assert "begins with nothing" in look(b"")
    assert "begins with 00 00" in look(bytes(len(data)))
    assert "60x40 pixels, the index 61x40" in look(data, 40, 61)
    for end in range(1, len(data)):
        assert look(data[:end]), end


def test_every_image_that_was_packed_passes(shared):
    """Photographs and radiographs of real cameras, some turned by EXIF: Pillow tells the sizes."""
    seen = 0
    for path in sorted(p for p in (shared / "data").rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))[:400]:
        with Image.open(path) as image:
            if image.mode in ("L", "RGB", "P", "RGBA", "I;16"):
                assert look(path.read_bytes(), image.height, image.width) is None, path
                seen += 1
    if not seen:
        pytest.skip("no JPEG or PNG files there")


@pytest.mark.parametrize("backend", ["dali", "host"])
def test_damaged_images_do_not_end_the_process(backend):
    """100 of 12 kinds, sound ones between them; `python -m tests.fuzz.decoding` feeds more."""
    if backend == "dali" and importlib.util.find_spec("nvidia.dali") is None:
        pytest.skip("DALI is not installed")
    found = decoding.fuzz(100, 1, backend)
    assert found["crashes"] == []
    assert sum(found["outcomes"].values()) == 100
    assert found["outcomes"]["before decoding"] > 40
