"""Tensors and values to bytes and back: dtypes, codecs, digests, typed JSON."""
