"""The save path: layout, digests, packs, manifest, one transaction."""

from dcpstore.saving.flow import SaveTarget, save_version

__all__ = ["SaveTarget", "save_version"]
