"""The journal of a repository: every finished operation, durable in the data folder too.

Whoever changed the repository calls `write_journal` afterwards; what an earlier crash left
unwritten is written first, so operations lie there without gaps. Two who write one operation write
the same.
"""

from __future__ import annotations

import logging

from dcpstore.catalog import Catalog
from dcpstore.errors import DcpstoreError
from dcpstore.storage.interface import Storage
from dcpstore.storage.operations import encode_operation, operation_key

__all__ = ["write_journal"]

_log = logging.getLogger(__name__)


def write_journal(catalog: Catalog, storage: Storage) -> None:
    """Write the operations that the data folder lacks.

    A failure is logged, not raised: the change is made and stays so, and the next one writes what
    is missing.
    """
    try:
        while operations := catalog.unjournaled():
            for said in operations:
                storage.put(operation_key(said["operation"]), encode_operation(said))
            catalog.mark_journaled(operations[-1]["operation"])
    except DcpstoreError as error:
        _log.warning(
            "an operation is not in the journal of %s yet (%s); the next change writes it",
            storage.url,
            error,
        )
