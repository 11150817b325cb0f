"""The format of packs: read, write, verify, join."""
