"""The save path: layout, digests, packs, manifest, one transaction."""

from dcpstore.saving.flow import SaveRequest, SaveTarget, save_version

__all__ = ["SaveRequest", "SaveTarget", "save_version"]
