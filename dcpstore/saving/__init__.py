"""The save path: layout, digests, packs, manifest, one transaction."""
