"""The lease of a running save: renewed as long as the coordinator lives, by a thread of its own.

Garbage collection takes a save that was silent for its lease for crashed, and clears what it wrote.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dcpstore.catalog import Catalog
from dcpstore.errors import DcpstoreError

__all__ = ["kept_lease"]

_log = logging.getLogger(__name__)
_SECONDS = 30.0  # between renewals; gc takes an hour of silence for a crash


@contextmanager
def kept_lease(catalog: Catalog, uid: str, *, seconds: float = _SECONDS) -> Iterator[None]:
    """Renew the lease of the pending version `uid` until the block ends."""
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(seconds):
            try:
                catalog.touch(uid)
            except DcpstoreError as error:
                _log.warning("the lease of the save %s was not renewed: %s", uid, error)

    thread = threading.Thread(target=renew, name="dcpstore-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
