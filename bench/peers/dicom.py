"""Radiographs in DICOM, made up, and what a loop over pydicom makes of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom import pixels
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless, generate_uid

SYNTAXES = {"explicit": ExplicitVRLittleEndian, "rle": RLELossless, "jpeg2000": JPEG2000Lossless}
BITS = 12


def write_radiographs(folder: Path, count: int, side: int, syntax: str) -> list[Path]:
    """`count` files of `side` by `side` pixels of 12 bits, MONOCHROME1, with a window: shadows that blur into each
    other, and grain. Each another patient's."""
    rng = np.random.default_rng(0)
    paths = []
    for k in range(count):
        coarse = Image.fromarray(rng.random((side // 64 + 2, side // 64 + 2), np.float32))
        shadows = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
        values = (3200 * shadows + 400 + rng.normal(0, 8, (side, side))).clip(0, 2**BITS - 1).astype(np.uint16)
        data = Dataset()
        data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", generate_uid()
        data.StudyInstanceUID, data.SeriesInstanceUID, data.PatientID = generate_uid(), generate_uid(), f"P{k}"
        data.Rows = data.Columns = side
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME1", 0
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, BITS, BITS - 1
        data.WindowCenter, data.WindowWidth = "2048", "3000"
        data.PixelData = values.tobytes()
        data["PixelData"].VR = "OW"
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"{k:04d}"
        file = FileDataset(path, data, file_meta=meta, preamble=bytes(128))
        if syntax != "explicit":
            file.compress(SYNTAXES[syntax], generate_instance_uid=False)
        file.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def plain_loop(paths: Sequence[Path], folder: Path, level: int) -> None:
    """Each as gray PNG of 16 bits, as a script would do it. `level`: of zlib."""
    for path in paths:
        data = pydicom.dcmread(path)
        values = pixels.apply_voi_lut(pixels.apply_modality_lut(data.pixel_array, data), data)
        levels = np.rint(values * (65535 / (2.0**data.BitsStored - 1))).astype(np.uint16)
        if data.PhotometricInterpretation == "MONOCHROME1":
            levels = 65535 - levels
        Image.fromarray(levels).save(folder / f"{path.name}.png", compress_level=level)
