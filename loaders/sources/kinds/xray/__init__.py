"""Chest X-rays: the sets of the paper, with their labels, patients and splits."""

from loaders.sources.kinds.xray.source import HELP, KIND, SETTINGS, accepts, listing

__all__ = ["HELP", "KIND", "SETTINGS", "accepts", "listing"]
