"""The BiT family: its networks, its names, and the formats of its weights."""
