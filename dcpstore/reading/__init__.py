"""Stored tensors and values: read, verified, and compared."""
