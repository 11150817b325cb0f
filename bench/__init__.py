"""Measurements: what is fast, how fast, and how sure that is. Nothing here is needed for training."""
