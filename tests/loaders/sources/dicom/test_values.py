"""The values of DICOM images against pydicom's own pipeline, over its own test files and over made ones."""

import contextlib
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import pixels
from pydicom.data import data_manager, download
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import compress
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from loaders.sources.kinds.dicom import reading
from loaders.sources.kinds.dicom.frames import frame
from loaders.sources.kinds.dicom.reading import Unusable, heading
from loaders.sources.kinds.dicom.values import shown
from tests.support.dicom import encoded, gradient, image, lut, write
from tests.support.pictures import encoded as pictures_encoded
from tests.support.pictures import photo

FOLDER = Path(pydicom.__file__).parent / "data" / "test_files"
OWN = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file())
ELSEWHERE = sorted(set(download.get_url_map()) - set(OWN))


def picture(path, index=0, window="file"):
    return shown(*frame(str(path), index), index, window)


def oracle(path, index, window="file"):
    """What pydicom makes of a frame, scaled as packs have it."""
    dataset = pydicom.dcmread(path, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        guessed = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = guessed
    values = pixels.pixel_array(dataset, index=index)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        values = pixels.apply_color_lut(values, dataset)
        return np.rint(values / np.iinfo(values.dtype).max * 255)
    if dataset.SamplesPerPixel == 3:
        return np.rint(values.astype(np.float64) / (2.0**dataset.BitsStored - 1) * 255)
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        group = dataset[groups].value[index if groups.startswith("Per") else 0] if groups in dataset else {}
        for inner in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            dataset.update(group[inner].value[0] if inner in group else {})
    luts = {name: dataset[name].value[0].LUTDescriptor[2]
            for name in ("ModalityLUTSequence", "VOILUTSequence") if name in dataset}  # fmt: skip
    slope, intercept = dataset.get("RescaleSlope", 1), dataset.get("RescaleIntercept", 0)
    half = 2.0 ** (dataset.BitsStored - 1) if dataset.PixelRepresentation else 0
    low, high = ((end - half) * slope + intercept for end in (0, 2.0**dataset.BitsStored - 1))
    if luts:
        low, high = 0, 2.0 ** list(luts.values())[-1] - 1
    values = pixels.apply_modality_lut(values, dataset)
    if window == "extremes":
        low, high = float(values.min()), float(values.max())
    else:
        values = pixels.apply_voi_lut(values, dataset)
    white = 65535 if max(dataset.BitsStored, *luts.values(), 1) > 8 else 255
    levels = np.rint((values - low) / (high - low) * white).clip(0, white)
    return white - levels if dataset.PhotometricInterpretation == "MONOCHROME1" else levels


def agree(found, expected):
    assert found.shape == expected.shape
    difference = np.abs(found.astype(np.float64) - expected)
    assert difference.max() <= 1  # where a half is rounded the other way
    assert (difference > 0).mean() < 0.02


def check(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path, force=True)
        if not {"PixelData", "Rows"} <= set(dataset.dir()):
            with contextlib.suppress(Unusable):
                assert not dataset.dir() or heading(str(path)) is None
            return
        try:
            frames = int(dataset.get("NumberOfFrames") or 1)
            wanted = [oracle(path, index) for index in (0, frames - 1)]
        except Exception:
            with pytest.raises(Unusable):
                picture(path)
            return
        window = "file"
        if dataset.BitsStored > 16 and dataset.SamplesPerPixel == 1 and "WindowWidth" not in dataset:
            with pytest.raises(Unusable, match="32 bits, and no window"):
                picture(path)
            window = "extremes"
            wanted = [oracle(path, index, window) for index in (0, frames - 1)]
    for index, expected in zip((0, frames - 1), wanted, strict=True):
        agree(picture(path, index, window), expected)


@pytest.mark.parametrize("name", OWN)
def test_files_of_pydicom_are_what_it_makes_of_them(name):
    check(FOLDER / name)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_files_that_pydicom_downloads_are_what_it_makes_of_them(name):
    places = [source.get_path(name, 0) for source in data_manager.external_data_sources().values()
              if name in {Path(each).name for each in source.get_paths(name, 0)}]  # fmt: skip
    places += [str(download.get_data_dir() / name)] if (download.get_data_dir() / name).exists() else []
    if not places:
        pytest.skip("not here: pip install pydicom-data brings it")
    check(places[0])


# Made files: what pydicom's own do not show


def made(tmp_path, *parts, index=0, window="file", syntax=ExplicitVRLittleEndian, **tags):
    return picture(write(tmp_path / "a", image(*parts, **tags), syntax), index, window)


@pytest.mark.parametrize("bits", range(9, 17))
@pytest.mark.parametrize("signed", [False, True])
def test_every_gray_level_of_9_to_16_bits_is_kept(tmp_path, bits, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    pixels = np.arange(low, low + 2**bits).astype(np.int16 if signed else np.uint16).reshape(2**5, -1)
    found = made(tmp_path, pixels, bits)
    assert found.dtype == np.uint16
    assert len(np.unique(found)) == 2**bits
    assert (found.min(), found.max()) == (0, 65535)
    assert (np.diff(found.ravel().astype(int)) > 0).all()


@pytest.mark.parametrize("bits", [1, 6, 8])
def test_up_to_8_bits_are_gray_of_8(tmp_path, bits):
    pixels = np.arange(2**bits).astype(np.uint8).reshape(2, -1)
    found = made(tmp_path, pixels, bits)
    np.testing.assert_array_equal(found, np.rint(pixels * (255 / (2**bits - 1))))
    assert found.dtype == np.uint8


def test_a_window_comes_after_the_rescale_and_before_the_inversion(tmp_path):
    pixels = np.array([[0, 100, 150, 175, 200, 4095]], np.uint16)
    tags = {"RescaleSlope": "2", "RescaleIntercept": "-100", "WindowCenter": "200.5", "WindowWidth": "201",
            "VOILUTFunction": "LINEAR"}  # fmt: skip
    # As PS3.3, C.11.2.1.2.1 has it: from 100 to 300 of the rescaled values -100, 100, 200, 250, 300, 8090.
    expected = np.rint(65535 * np.array([[0, 0, 0.5, 0.75, 1, 1]]))
    np.testing.assert_array_equal(made(tmp_path, pixels, 12, **tags), expected)
    np.testing.assert_array_equal(made(tmp_path, pixels, 12, "MONOCHROME1", **tags), 65535 - expected)


@pytest.mark.parametrize(
    ("function", "light"),
    [("LINEAR_EXACT", [0, 0.25, 0.5, 0.75, 1]), ("SIGMOID", 1 / (1 + np.exp([8, 1, 0, -1, -8])))],
)
def test_functions_of_windows(tmp_path, function, light):
    steps = [-200, -100, 0, 100, 200] if function == "LINEAR_EXACT" else [-800, -100, 0, 100, 800]
    pixels = np.array([steps]).astype(np.int16).view(np.uint16) + np.uint16(2000)
    tags = {"WindowCenter": "2000", "WindowWidth": "400", "VOILUTFunction": function}
    np.testing.assert_array_equal(made(tmp_path, pixels, 12, **tags), np.rint(65535 * np.array([light])))


def test_the_first_of_several_windows_counts_and_one_may_be_given(tmp_path):
    pixels = gradient(white=4095)
    several = {"WindowCenter": ["1000", "3000"], "WindowWidth": ["500", "100"]}
    first = made(tmp_path, pixels, 12, WindowCenter="1000", WindowWidth="500")
    np.testing.assert_array_equal(made(tmp_path, pixels, 12, **several), first)
    np.testing.assert_array_equal(made(tmp_path, pixels, 12, window=(1000.0, 500.0)), first)
    assert not np.array_equal(made(tmp_path, pixels, 12, **several, window=(3000.0, 100.0)), first)


def test_all_that_can_be_stored_or_the_extremes_of_the_image(tmp_path):
    pixels = gradient(white=1100, low=100)
    tags = {"WindowCenter": "1000", "WindowWidth": "500"}
    full = np.rint(pixels * (65535 / 4095))
    np.testing.assert_array_equal(made(tmp_path, pixels, 12), full)
    np.testing.assert_array_equal(made(tmp_path, pixels, 12, **tags, window="full"), full)
    np.testing.assert_array_equal(
        made(tmp_path, pixels, 12, **tags, window="extremes"), np.rint((pixels - 100.0) * 65.535)
    )
    assert not made(tmp_path, np.full((4, 4), 7, np.uint16), 12, window="extremes").any()


@pytest.mark.parametrize("packed", [False, True])
def test_a_table_of_bytes_for_more_values_than_a_byte_has(tmp_path, packed):
    """pydicom 3.0 counts values in the type of the entries, and fails."""
    table = np.arange(4096) // 16
    pixels = gradient(white=4095)
    found = made(tmp_path, pixels, 12, VOILUTSequence=[lut(0, table.tolist(), 8, packed)])
    np.testing.assert_array_equal(found, np.rint(table[pixels] * (65535 / 255)))


def test_tables_begin_anywhere_and_go_before_windows(tmp_path):
    table = [0, 100, 300, 1023]
    tags = {"VOILUTSequence": [lut(-1, table, 10)], "WindowCenter": "1", "WindowWidth": "2"}
    pixels = np.array([[-7, -1, 0, 1, 2, 500]], np.int16)
    found = made(tmp_path, pixels, 12, **tags, syntax=ImplicitVRLittleEndian)
    np.testing.assert_array_equal(found, np.rint(np.array([[0, 0, 100, 300, 1023, 1023]]) * (65535 / 1023)))


def test_a_modality_table_goes_before_a_rescale_and_a_window(tmp_path):
    tags = {"ModalityLUTSequence": [lut(0, [0, 10, 50, 255], 8)], "RescaleSlope": "9", "RescaleIntercept": "9"}
    pixels = np.array([[0, 1, 2, 3, 200]], np.uint8)
    np.testing.assert_array_equal(made(tmp_path, pixels, **tags), [[0, 10, 50, 255, 255]])
    windowed = made(tmp_path, pixels, **tags, WindowCenter="30.5", WindowWidth="41")
    np.testing.assert_array_equal(windowed, [[0, 0, 255, 255, 255]])


def test_frames_of_an_enhanced_image_have_their_own_values(tmp_path):
    def group(**sequences):
        found = Dataset()
        for name, tags in sequences.items():
            inner = Dataset()
            for tag, value in tags.items():
                setattr(inner, tag, value)
            setattr(found, name, [inner])
        return found

    pixels = np.stack([gradient(white=1000), gradient(white=1000)])
    window = {"WindowCenter": "500", "WindowWidth": "1001", "VOILUTFunction": "LINEAR_EXACT"}
    tags = {
        "SharedFunctionalGroupsSequence": [group(FrameVOILUTSequence=window)],
        "PerFrameFunctionalGroupsSequence": [
            group(PixelValueTransformationSequence={"RescaleSlope": "1", "RescaleIntercept": str(k)}) for k in (0, 400)
        ],
        "RescaleSlope": "77", "RescaleIntercept": "5",
    }  # fmt: skip
    for index, shift in enumerate((0, 400)):
        light = (np.minimum(pixels[index] + shift, 1000.5) - 500) / 1001 + 0.5
        np.testing.assert_array_equal(made(tmp_path, pixels, 12, index=index, **tags), np.rint(65535 * light))


def test_numbers_of_any_length_are_read(tmp_path):
    tags = {"RescaleSlope": "0.333333333333", "RescaleIntercept": "-12.34567890123", "WindowWidth": "100.123456789"}
    made(tmp_path, gradient(), 12, WindowCenter="0.1", **tags)
    made(tmp_path, gradient(), 12, window=(1 / 3, 1000 / 7))


SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]


@pytest.mark.parametrize("syntax", [*SYNTAXES, RLELossless, JPEG2000Lossless], ids=lambda uid: uid.name)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16])
def test_transfer_syntaxes_give_the_same_picture(tmp_path, syntax, kind):
    pixels = np.stack([gradient(35, 43, 120, kind), gradient(35, 43, 90, kind)])
    expected = [made(tmp_path, pixels, index=index) for index in range(2)]
    dataset = image(pixels)
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder(">")).tobytes()
    elif syntax not in SYNTAXES:
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        compress(dataset, syntax, generate_instance_uid=False)
    path = write(tmp_path / "b", dataset, syntax)
    for index in range(2):
        np.testing.assert_array_equal(picture(path, index), expected[index])


def test_colour_is_rgb_of_8_bits(tmp_path):
    pixels = np.asarray(photo(1, 20, 30))
    np.testing.assert_array_equal(made(tmp_path, pixels), pixels)
    deep = (pixels.astype(np.uint16) << 4) + 5
    np.testing.assert_array_equal(made(tmp_path, deep, 12), np.rint(deep * (255 / 4095)))
    ybr = np.asarray(photo(1, 20, 30).convert("YCbCr"))
    assert np.abs(made(tmp_path, ybr, kind="YBR_FULL").astype(int) - pixels).max() <= 3  # both round


# Files that cannot be used


def jpeg(pixels):
    dataset = image(pixels, PhotometricInterpretation="MONOCHROME2")
    dataset.PixelData = encapsulate([pictures_encoded(Image.fromarray(pixels), "JPEG")])
    dataset["PixelData"].is_undefined_length = True
    return dataset


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"Rows": None}, "no rows"), ({"Columns": 0}, "'Columns' value of '0'"),
        ({"BitsAllocated": None}, "no bits allocated"), ({"SamplesPerPixel": None}, "no samples per pixel"),
        ({"PhotometricInterpretation": None}, "interpretation is missing; expected MONOCHROME1, MONOCHROME2"),
        ({"PhotometricInterpretation": "DOE_JOHN"}, "interpretation is one that is not known here"),
        ({"PhotometricInterpretation": "RGB"}, "says RGB, with 1 samples"), ({"SamplesPerPixel": 3}, "with 3 samples"),
        ({"PhotometricInterpretation": "YBR_PARTIAL_420"}, "not known here"),
        ({"PixelRepresentation": None}, "Pixel Representation"),
        ({"BitsStored": 17, "HighBit": None}, "'Bits Stored' value of '17'"),
        ({"BitsStored": 12}, "highest bit is 15, of 12 bits stored; expected 11"),
        ({"Rows": 17}, r"end early: 640 bytes of 680"), ({"Rows": 60000, "Columns": 60000}, "up to 178,956,970"),
        ({"PixelData": None}, "no pixels"), ({"RescaleSlope": "0", "RescaleIntercept": "1"}, "slope is 0"),
        ({"WindowCenter": "1", "WindowWidth": "0"}, "0 wide, too little for LINEAR; --set window="),
        ({"WindowCenter": "1", "WindowWidth": "2", "VOILUTFunction": "DOE_JOHN"}, "none of LINEAR, LINEAR_EXACT"),

        ({"VOILUTSequence": [lut(0, [1, 2], 31)]}, "2 of 2 entries, of 31 bits"),
    ],
)  # fmt: skip
def test_what_is_missing_or_contradictory_is_named(tmp_path, tags, reason):
    path = write(tmp_path / "a", image(gradient(), **tags))
    with pytest.raises(Unusable, match=reason) as told:
        picture(path)
    assert "DOE" not in str(told.value)


def test_a_transfer_syntax_that_is_not_the_pixels_is_named(tmp_path):
    pixels = gradient(white=255, kind=np.uint8)
    path = write(tmp_path / "a", jpeg(pixels), JPEGBaseline8Bit)
    data = path.read_bytes()
    assert picture(path).shape == (16, 20)
    for other, reason in (
        (b"1.2.840.10008.1.2.4.99", "pydicom has no decoder for its transfer syntax, of an unknown name"),
        (b"1.2.840.10008.1.2.6.1\0", "no decoder for its transfer syntax, RFC 2557"),
        (b"1.2.840.10008.1.2.1\0\0\0", "are compressed, its transfer syntax is Explicit VR Little"),
    ):
        path.write_bytes(data.replace(b"1.2.840.10008.1.2.4.50", other))
        with pytest.raises(Unusable, match=reason):
            picture(path)


def test_colour_whose_pixels_are_more_than_its_subsampling_has_is_refused(tmp_path):
    with pytest.raises(Unusable, match="says YBR_FULL_422, and its pixels are too many"):
        made(tmp_path, np.asarray(photo(1, 20, 30)), kind="YBR_FULL_422")


def test_a_compressed_image_of_another_size_is_not_decoded(tmp_path):
    dataset = jpeg(gradient(white=255, kind=np.uint8))
    dataset.Rows = 8
    with pytest.raises(Unusable, match="header says 8 by 20 pixels, its compressed image 16 by 20"):
        picture(write(tmp_path / "a", dataset, JPEGBaseline8Bit))


def test_a_small_file_takes_little_memory(tmp_path):
    """16 MiB, or a thousand times its bytes; what asks for more is refused before it is given."""
    dataset = image(gradient(white=255, kind=np.uint8))
    dataset.Rows = dataset.Columns = 12000
    dataset.PixelData = encapsulate([bytes(100)])
    dataset["PixelData"].is_undefined_length = True
    path = write(tmp_path / "a", dataset, RLELossless)
    tracemalloc.start()
    try:
        with pytest.raises(Unusable, match="asks for 144,000,000 bytes of pixels, of 100 compressed ones"):
            picture(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_what_inflates_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_MOST_INFLATED", 1 << 16)
    dataset = image(np.zeros((512, 512), np.uint8))
    with pytest.raises(Unusable, match="inflates to more than 65,536 bytes"):
        picture(write(tmp_path / "a", dataset, DeflatedExplicitVRLittleEndian))


def test_lengths_beyond_the_file_take_no_memory(tmp_path):
    data = bytearray(encoded(image(gradient(), PatientComments="x" * 40)))
    at = data.index(b"x" * 40)
    data[at - 4 : at] = b"\xff\xff\xff\x7f"  # after a VR whose length has 2 bytes it is something else; both end
    (tmp_path / "a").write_bytes(data)
    with contextlib.suppress(Unusable):
        heading(str(tmp_path / "a"))
    with pytest.raises(Unusable):
        picture(tmp_path / "a")
