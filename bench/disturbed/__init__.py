"""Runs that something happens to: what is done to them, and whether it is noticed."""
