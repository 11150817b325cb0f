"""The training engine: network, optimizer, communicator, trainer, and their command lines."""
