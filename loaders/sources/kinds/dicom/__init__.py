"""DICOM, as a PACS exports it: a folder of files, nested anyhow, with or without extensions."""

from loaders.sources.kinds.dicom.source import HELP, KIND, SETTINGS, accepts, listing

__all__ = ["HELP", "KIND", "SETTINGS", "accepts", "listing"]
