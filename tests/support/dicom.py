"""DICOM files, as tests make them with pydicom."""

import io

import numpy as np
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CR = "1.2.840.10008.5.1.4.1.1.1"  # Computed Radiography Image Storage
WHO = {
    # what a hospital's file says of persons, places and times, each value found nowhere else
    "PatientName": "VANDERBERG^QUIRINA", "PatientID": "PID-7734191", "PatientBirthDate": "19470313",
    "PatientAddress": "17 Larkspur Mews", "OtherPatientIDs": "OTHER-55102", "AccessionNumber": "ACC9921873",
    "StudyDate": "20191107", "SeriesDate": "20191108", "ContentDate": "20191109", "AcquisitionDate": "20191110",
    "StudyTime": "171533.25", "InstitutionName": "St Hildegard Infirmary", "InstitutionAddress": "4 Quayside",
    "ReferringPhysicianName": "OKONKWO^BASIL", "OperatorsName": "TREMBLAY^ODILE", "StationName": "RAD-ROOM-9",
    "PatientComments": "came by tram", "StudyDescription": "thorax in two planes", "StudyID": "STID4410",
    "DeviceSerialNumber": "SN-882-19", "RequestedProcedureID": "REQ-10233",
}  # fmt: skip


def header(**tags):
    """A dataset of a computed radiograph, without pixels."""
    dataset = Dataset()
    dataset.SOPClassUID = CR
    dataset.SOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID = generate_uid()
    dataset.SeriesInstanceUID = generate_uid()
    dataset.PatientID = "A"
    for name, value in tags.items():
        setattr(dataset, name, value)
    return dataset


def image(pixels, bits=None, kind=None, **tags):
    """A dataset with these pixels: (H, W), (N, H, W) gray or (H, W, 3) colour; of `tags`, None takes one away."""
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    dataset = header()
    dataset.Rows, dataset.Columns = pixels.shape[:2] if pixels.ndim == 2 or colour else pixels.shape[1:3]
    dataset.SamplesPerPixel = 3 if colour else 1
    if colour:
        dataset.PlanarConfiguration = 0
    if pixels.ndim == 3 and not colour:
        dataset.NumberOfFrames = len(pixels)
    dataset.PhotometricInterpretation = kind or ("RGB" if colour else "MONOCHROME2")
    dataset.BitsAllocated = 8 * pixels.dtype.itemsize
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    data = pixels.tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OW" if dataset.BitsAllocated > 8 else "OB"
    for name, value in tags.items():
        if value is None:
            del dataset[name]
        else:
            setattr(dataset, name, value)
    return dataset


def encoded(dataset, syntax=ExplicitVRLittleEndian):
    """The bytes of a file."""
    meta = getattr(dataset, "file_meta", None) or FileMetaDataset()
    meta.TransferSyntaxUID = meta.get("TransferSyntaxUID", syntax)
    meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID", CR)
    meta.MediaStorageSOPInstanceUID = dataset.get("SOPInstanceUID", "1.2.3")
    out = io.BytesIO()
    file = FileDataset(out, dataset, file_meta=meta, preamble=b"\0" * 128)
    dcmwrite(out, file, enforce_file_format=True)
    return out.getvalue()


def write(path, dataset, syntax=ExplicitVRLittleEndian):
    """A file with it, in folders that are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(dataset, syntax))
    return path


def lut(first, data, bits, packed=False):
    """An item of a sequence of look-up tables."""
    item = Dataset()
    item.LUTDescriptor = [len(data) % 65536, first, bits]
    item["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    item.LUTData = bytes(data) if packed else np.asarray(data, "<u2").tobytes()
    item["LUTData"].VR = "OW"
    return item


def gradient(height=16, width=20, white=4095, kind=np.uint16, low=0):
    """Values from `low` to `white`, all along the image."""
    return np.linspace(low, white, height * width).round().astype(kind).reshape(height, width)
