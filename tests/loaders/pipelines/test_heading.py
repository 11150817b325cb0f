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


@pytest.mark.parametrize("marker", [0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)])
def test_frames_that_decoders_do_not_have_in_common_are_named(marker):
    """Lossless, hierarchical and arithmetic ones, ITU-T T.81, table B.1."""
    data = SOUND["baseline"].replace(b"\xff\xc0\x00", bytes([0xFF, marker, 0]), 1)
    assert f"frame {marker:02x}" in look(data)


@pytest.mark.parametrize("segment", [b"\xff\xcc\x00\x04\x00\x00", b"\xff\xc8\x00\x04ab", b"\xff\xff\xff\xee\x00\x02"])
def test_other_segments_of_the_same_range_and_fill_bytes_are_no_frames(segment):
    """Conditioning of arithmetic coding, the reserved JPG, and an empty segment after bytes that fill."""
    assert look(SOUND["baseline"][:2] + segment + SOUND["baseline"][2:]) is None


def test_a_second_frame_is_named():
    data = SOUND["baseline"]
    at = data.index(b"\xff\xc0\x00")
    frame = data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]
    assert "frame c0" in look(data[:at] + frame + data[at:])


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


def test_sizes_of_two_bytes_are_read():
    assert look(encoded(photo(1, 300, 520)), 300, 520) is None
    assert "520x300 pixels, the index 8x44" in look(encoded(photo(1, 300, 520)), 300 & 255, 520 & 255)
