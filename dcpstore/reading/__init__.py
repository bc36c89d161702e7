"""Stored tensors and values, read and verified, for everyone who needs their bytes."""
