"""The journal of a repository: every finished operation, durable in the data folder too.

Every change of the repository calls `write_journal` afterwards; operations that an earlier crash
left unwritten are written first, so operations have no gaps. If two processes write one operation,
they write the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.maintenance.journal import mark_journaled, unjournaled
from dcpstore.catalog.write.operations import list_operations
from dcpstore.core.reentry import changing
from dcpstore.errors import CorruptionError, DcpstoreError, NotFoundError
from dcpstore.formats.journal_entry import (
    decode_operation,
    encode_operation,
    operation_key,
    operation_number,
)
from dcpstore.storage.interface import Storage

__all__ = ["Journaled", "changing_repository", "check_owner", "journaled", "write_journal"]

P = ParamSpec("P")
R = TypeVar("R", bound="Journaled")
T = TypeVar("T")

_log = logging.getLogger(__name__)


class Journaled(Protocol):
    """What has a journal: a catalog, and the storage of its data."""

    catalog: Catalog

    @property
    def storage(self) -> Storage: ...


def journaled(method: Callable[Concatenate[R, P], T]) -> Callable[Concatenate[R, P], T]:
    """Have a method that changes its repository write the journal before it returns."""

    @wraps(method)
    def run(self: R, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with changing_repository(self.catalog), self.catalog.keep_connection():
            result = method(self, *args, **kwargs)
            write_journal(self.catalog, self.storage)
        return result

    return run


def changing_repository(catalog: Catalog) -> AbstractContextManager[None]:
    """Refuse a change of a repository inside another one of this thread.

    Raises:
        ConflictError: this is one.
    """
    uid = catalog.repository.uid
    return changing(f"repository {uid}", shown=f"the repository {uid}")


def check_owner(catalog: Catalog, storage: Storage) -> None:
    """Refuse a data folder that another repository's journal lies in.

    The first operation names the owner. Where it is missing or damaged, the next sound one must be
    what the catalog has under that number: nobody else's is.

    Raises:
        DcpstoreError: it is another's, or that cannot be found out.
    """
    try:
        owner = decode_operation(storage.get(operation_key(1)))["repository"]["uid"]
    except NotFoundError:
        if _are_own(catalog, storage) is False:
            raise DcpstoreError(_foreign(storage, "missing")) from None
        return  # or nothing was journaled yet
    except (CorruptionError, LookupError) as error:
        own = _are_own(catalog, storage)
        if own is False:
            raise DcpstoreError(_foreign(storage, f"damaged ({error})")) from error
        if own is None:
            raise DcpstoreError(
                f"cannot tell whose data {storage.url!r} is: its first operation is damaged "
                f"({error}), and there is no other. Restore operations/000000000001.json from a "
                "copy."
            ) from error
        return
    if owner != catalog.repository.uid:
        raise DcpstoreError(
            f"the data in {storage.url!r} belongs to repository {owner}, and this one is "
            f"{catalog.repository.uid}; nothing was changed. Give each its own data folder, or "
            "restore the first's catalog with 'dcpstore rebuild'."
        )


def write_journal(catalog: Catalog, storage: Storage) -> bool:
    """Write the operations that the data folder lacks; tell whether it has all of them now.

    A failure is logged, not raised: the change is made and stays so, and the next one writes what
    is missing.
    """
    try:
        while operations := unjournaled(catalog):
            if operations[0]["kind"] == "init":
                check_owner(catalog, storage)
            for said in operations:
                storage.put(operation_key(said["operation"]), encode_operation(said))
            mark_journaled(catalog, operations[-1]["operation"])
    except DcpstoreError as error:
        _log.warning(
            "an operation is not in the journal of %s yet (%s); the next change writes it",
            storage.url,
            error,
        )
        return False
    return True


def _are_own(catalog: Catalog, storage: Storage) -> bool | None:
    """Tell whether the first sound operation after number 1 is the catalog's; None: there is none.

    By its time, too, which is kept to the microsecond.
    """
    done = {operation.number: operation for operation in list_operations(catalog)}
    for number in sorted(filter(None, map(operation_number, storage.list("operations")))):
        try:
            said = decode_operation(storage.get(operation_key(number)))
        except (NotFoundError, CorruptionError):
            continue
        if number > 1:
            own = done.get(number)
            at = datetime.fromisoformat(said["created_at"])
            return own is not None and (own.kind, own.target, own.created_at) == (
                said["kind"],
                said["target"],
                at,
            )
    return None


def _foreign(storage: Storage, what: str) -> str:
    return (
        f"the operations in {storage.url!r} are another repository's, whose first one is {what}; "
        "nothing was changed. Give each its own data folder, or restore "
        "operations/000000000001.json from a copy."
    )
