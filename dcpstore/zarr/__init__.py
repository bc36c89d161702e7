"""A version as an ordinary Zarr v3 group: its documents, and a read-only Zarr store over packs."""
