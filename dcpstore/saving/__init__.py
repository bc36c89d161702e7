"""The save path: layout, digests, packs, manifest, one transaction."""

from dcpstore.saving.commit import SaveTarget
from dcpstore.saving.request import (
    SaveOptions,
    SaveRequest,
    check_options,
    make_request,
    own_request,
    shows_options,
)
from dcpstore.saving.save_pipeline import save_version

__all__ = [
    "SaveOptions",
    "SaveRequest",
    "SaveTarget",
    "check_options",
    "make_request",
    "own_request",
    "save_version",
    "shows_options",
]
