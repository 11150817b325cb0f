"""Other loaders, measured beside ours."""
