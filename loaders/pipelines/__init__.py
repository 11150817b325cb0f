"""From a pack to batches: the order of samples, their augmentation, and the pixels."""
