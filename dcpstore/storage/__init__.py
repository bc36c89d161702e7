"""Bytes at rest: a small storage interface, local folders, object stores, packs and manifests."""
