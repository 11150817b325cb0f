"""Formats that files of sources are written in, read without their libraries."""
