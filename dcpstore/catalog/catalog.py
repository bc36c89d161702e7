"""`Catalog`: an open catalog, as every function with SQL takes it.

The functions themselves are in `read`, `write` and `maintenance`; each says beside its SQL how it
runs as a transaction (see `db.transactions`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from dcpstore.catalog.db.database import Database
from dcpstore.catalog.schema.lifecycle import (
    create_repository,
    open_repository,
)
from dcpstore.records import (
    ChunkDefaults,
    RepositoryRecord,
)

__all__ = ["Catalog"]


class Catalog:
    """The catalog of one repository; threads may share it.

    Attributes:
        database: the way to it.
        repository: the one row about the repository, as it was when the catalog was opened.
    """

    def __init__(self, database: Database, repository: RepositoryRecord) -> None:
        self.database = database
        self.repository = repository

    @property
    def folder(self) -> Path | None:
        """The folder of its file, from which relative places of data count; None on a server."""
        file = self.database.file
        return None if file is None else file.parent

    @property
    def shown(self) -> str:
        """The database URL for people to read: no password, and no option that may hold one."""
        return self.database.shown

    @classmethod
    def open(cls, url: str, *, data_url: str | None = None) -> Catalog:
        """Open the catalog at a database URL.

        Args:
            url: `sqlite:///path` (see `sqlite_url`) or `postgresql://user@host/database`.
            data_url: where its packs and manifests must lie.

        Raises:
            NotFoundError: there is no catalog, or no way to it.
            InvalidInputError: the URL is invalid, or its data lie elsewhere.
            SchemaError: the database is not ours, older or newer; the message names the cure.
        """
        return cls._opened(url, lambda found: open_repository(found, data_url=data_url))

    @classmethod
    def make(
        cls,
        url: str,
        *,
        data_url: str | None,
        chunk: ChunkDefaults | None = None,
        make_data: Callable[[], object] = lambda: None,
    ) -> Catalog:
        """Make a catalog in the empty database at a URL.

        Args:
            url: as for `open`.
            data_url: where packs and manifests are to lie.
            chunk: how the repository cuts and encodes.
            make_data: makes the place of the data; called just before the catalog is made.

        Raises:
            AlreadyExistsError: there is a catalog.
            InvalidInputError: the URL is invalid, or `data_url` is missing.
            NotFoundError: there is no way to the database.
            SchemaError: the database is not empty.
        """
        return cls._opened(
            url,
            lambda empty: create_repository(
                empty, data_url=data_url, chunk=chunk, make_data=make_data
            ),
        )

    @classmethod
    def _opened(cls, url: str, find: Callable[[Database], RepositoryRecord]) -> Catalog:
        database = Database(url)
        try:
            return cls(database, find(database))
        except BaseException:
            database.close()
            raise

    def close(self) -> None:
        """Close the connections."""
        self.database.close()

    def keep_connection(self) -> AbstractContextManager[None]:
        """Keep a connection to a server for the transactions in the block; outside none is."""
        return self.database.keep_connection()

    def __enter__(self) -> Catalog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Catalog({self.shown!r})"
