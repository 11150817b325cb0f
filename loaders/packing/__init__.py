"""How a source becomes a pack, spread over processes and nodes."""
