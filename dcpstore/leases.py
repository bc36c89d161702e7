"""The lease of a running save: renewed as long as the coordinator lives, by a thread of its own.

Garbage collection takes a save that was silent for its lease for crashed, and clears what it wrote.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from dcpstore.catalog import Catalog
from dcpstore.errors import DcpstoreError
from dcpstore.records import RankProgress

__all__ = ["kept_lease"]

_log = logging.getLogger(__name__)
_FIRST = 1.0  # seconds; what ends sooner costs the database nothing
_SECONDS = 10.0  # between renewals; gc takes an hour of silence for a crash


@contextmanager
def kept_lease(
    catalog: Catalog,
    uid: str,
    *,
    progress: Callable[[], Sequence[RankProgress]] = tuple,
    seconds: float = _SECONDS,
) -> Iterator[None]:
    """Renew the lease of the pending version `uid` until the block ends.

    With each renewal the catalog is told the `progress` of the ranks. A connection to it is kept
    as well, for what the save asks meanwhile.
    """
    ended = threading.Event()

    def renew() -> None:
        pause = min(_FIRST, seconds)
        while not ended.wait(pause):
            pause = seconds
            try:
                catalog.touch(uid, progress())
            except DcpstoreError as error:
                _log.warning("the lease of the save %s was not renewed: %s", uid, error)

    thread = threading.Thread(target=renew, name="dcpstore-lease", daemon=True)
    thread.start()
    try:
        with catalog.kept():
            yield
    finally:
        ended.set()
        thread.join()
