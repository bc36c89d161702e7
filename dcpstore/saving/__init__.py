"""The save path: layout, digests, packs, manifest, one transaction."""

from dcpstore.saving.commit import MetricsFrom, SaveRequest, SaveTarget, make_request, own_request
from dcpstore.saving.save_pipeline import save_version

__all__ = [
    "MetricsFrom",
    "SaveRequest",
    "SaveTarget",
    "make_request",
    "own_request",
    "save_version",
]
