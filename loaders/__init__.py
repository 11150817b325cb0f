"""Packed datasets and the pipelines that read them. Knows nothing of networks: `loaders` never imports `engine`."""
