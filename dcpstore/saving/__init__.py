"""The save path: layout, digests, packs, manifest, one transaction."""

from dcpstore.saving.flow import save_version
from dcpstore.saving.publishing import SaveRequest, SaveTarget, make_request

__all__ = ["SaveRequest", "SaveTarget", "make_request", "save_version"]
