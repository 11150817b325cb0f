"""A run: its parts, the training step, and what happens beside it."""
