"""The save path: layout, digests, packs, manifest, one transaction."""

from dcpstore.saving.flow import save_version
from dcpstore.saving.publishing import (
    MetricsFrom,
    SaveRequest,
    SaveTarget,
    make_request,
    own_request,
)

__all__ = [
    "MetricsFrom",
    "SaveRequest",
    "SaveTarget",
    "make_request",
    "own_request",
    "save_version",
]
