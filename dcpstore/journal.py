"""The journal of a repository: every finished operation, durable in the data folder too.

Whoever changed the repository calls `write_journal` afterwards; what an earlier crash left
unwritten is written first, so operations lie there without gaps. Two who write one operation write
the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from dcpstore.catalog import Catalog
from dcpstore.errors import CorruptionError, DcpstoreError, NotFoundError
from dcpstore.storage.interface import Storage
from dcpstore.storage.operations import decode_operation, encode_operation, operation_key

__all__ = ["Journaled", "check_owner", "journaled", "write_journal"]

P = ParamSpec("P")
R = TypeVar("R", bound="Journaled")
T = TypeVar("T")

_log = logging.getLogger(__name__)


class Journaled(Protocol):
    """What has a journal: a catalog, and the storage of its data."""

    catalog: Catalog
    storage: Storage


def journaled(method: Callable[Concatenate[R, P], T]) -> Callable[Concatenate[R, P], T]:
    """Have a method that changes its repository write the journal before it returns."""

    @wraps(method)
    def run(self: R, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.catalog.kept():
            result = method(self, *args, **kwargs)
            write_journal(self.catalog, self.storage)
        return result

    return run


def check_owner(catalog: Catalog, storage: Storage) -> None:
    """Refuse a data folder that another repository's journal lies in.

    Raises:
        DcpstoreError: it is another's, or cannot be told.
    """
    try:
        owner = decode_operation(storage.get(operation_key(1)))["repository"]["uid"]
    except NotFoundError:
        return  # nothing was journaled yet
    except (CorruptionError, LookupError) as error:
        raise DcpstoreError(
            f"cannot tell whose data {storage.url!r} is: its first operation is damaged ({error}). "
            "Restore operations/000000000001.json from a copy."
        ) from error
    if owner != catalog.repository.uid:
        raise DcpstoreError(
            f"the data in {storage.url!r} belongs to repository {owner}, and this one is "
            f"{catalog.repository.uid}; nothing was changed. Give each its own data folder, or "
            "restore the first's catalog with 'dcpstore rebuild'."
        )


def write_journal(catalog: Catalog, storage: Storage) -> None:
    """Write the operations that the data folder lacks.

    A failure is logged, not raised: the change is made and stays so, and the next one writes what
    is missing.
    """
    try:
        while operations := catalog.unjournaled():
            if operations[0]["kind"] == "init":
                check_owner(catalog, storage)
            for said in operations:
                storage.put(operation_key(said["operation"]), encode_operation(said))
            catalog.mark_journaled(operations[-1]["operation"])
    except DcpstoreError as error:
        _log.warning(
            "an operation is not in the journal of %s yet (%s); the next change writes it",
            storage.url,
            error,
        )
