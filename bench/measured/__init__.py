"""What measures: timing in turns, the timed trainer, its ranks."""
