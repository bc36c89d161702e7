"""References of versions, made from manifests and pages as they lie in the data folder.

The script that lies in each data folder makes them, so what it makes is what dcpstore makes. Here
the seal of each object is checked first. Neither torch nor the catalog is needed.
"""

from __future__ import annotations

import json
import logging
import zlib
from typing import Any

from dcpstore.errors import CorruptionError, DcpstoreError
from dcpstore.formats.sealed import check_seal, kind_of
from dcpstore.storage.interface import Storage
from dcpstore.zarr.references import references

__all__ = ["keep_reference", "reference_key", "version_reference", "write_reference"]

_log = logging.getLogger(__name__)


def reference_key(uid: str) -> str:
    """Return the key of a tagged version's reference."""
    return f"references/{uid}.json"


def version_reference(storage: Storage, uid: str, *, data: str) -> dict[str, Any]:
    """Return the kerchunk reference of a version, as JSON.

    Args:
        storage: of the repository.
        uid: of the version.
        data: the path or URL by which its readers find the data folder.

    Raises:
        NotFoundError: its manifest or a page is missing.
        CorruptionError: its manifest or a page is damaged.
    """

    def read(key: str) -> bytes:
        held = storage.get(key)
        check_seal(held, kind_of(held) or "manifest", what=f"object {key}")
        return held

    try:
        return references(read, uid, data)
    except DcpstoreError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, zlib.error) as error:
        raise CorruptionError(
            f"the manifest or a page of the version {uid} has an invalid member "
            f"({type(error).__name__}: {error}); run 'dcpstore verify --deep'."
        ) from error


def write_reference(storage: Storage, uid: str) -> None:
    """Write the reference of a version; raises what `version_reference` does."""
    reference = version_reference(storage, uid, data=storage.url)
    storage.put(reference_key(uid), json.dumps(reference, separators=(",", ":")).encode())


def keep_reference(storage: Storage, uid: str) -> None:
    """Write the reference of a tagged version.

    A failure is logged, not raised: the version has its tag, and the next collection of garbage
    writes references that are missing.
    """
    try:
        write_reference(storage, uid)
    except DcpstoreError as error:
        _log.warning("the reference of %s is not written yet (%s); gc writes it", uid, error)
