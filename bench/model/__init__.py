"""The scaling model, and the facts that it computes from."""
