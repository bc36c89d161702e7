"""`Catalog`: an open catalog, as every function with SQL takes it.

The functions are in `read`, `write` and `maintenance`; each has a decorator that says how it runs
as a transaction (see `db.transactions`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from dcpstore.catalog.db.database import Database
from dcpstore.catalog.schema.lifecycle import create_repository, open_repository
from dcpstore.records import ChunkDefaults, RepositoryRecord

__all__ = ["Catalog"]


class Catalog:
    """The catalog of one repository; threads may share it.

    Attributes:
        database: its connections.
        repository: the row about the repository, as it was when the catalog was opened.
    """

    def __init__(self, database: Database, repository: RepositoryRecord) -> None:
        self.database = database
        self.repository = repository

    @property
    def folder(self) -> Path | None:
        """The folder of its file, to which a relative data path refers; None on a server."""
        file = self.database.file
        return None if file is None else file.parent

    @property
    def shown(self) -> str:
        """The database URL for people to read, without password."""
        return self.database.shown

    @classmethod
    def open(cls, url: str, *, data_url: str | None = None) -> Catalog:
        """Open the catalog at a database URL.

        Args:
            url: `sqlite:///path` (see `sqlite_url`) or `postgresql://user@host/database`.
            data_url: where its packs and manifests must be.

        Raises:
            NotFoundError: there is no catalog, or the database cannot be reached.
            InvalidInputError: the URL is invalid, or its data are elsewhere.
            SchemaError: the database is not a catalog, or older or newer than this dcpstore; the
                message says what to do.
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
        """Create a catalog in the empty database at a URL.

        Args:
            url: as for `open`.
            data_url: where packs and manifests will be.
            chunk: how the repository cuts and encodes tensors.
            make_data: creates the place of the data; called just before the catalog is created.

        Raises:
            AlreadyExistsError: there is a catalog.
            InvalidInputError: the URL is invalid, or `data_url` is missing.
            NotFoundError: the database cannot be reached.
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
        except BaseException:  # an interrupt, too, must leave no connection open
            database.close()
            raise

    def close(self) -> None:
        """Close the connections."""
        self.database.close()

    def keep_connection(self) -> AbstractContextManager[None]:
        """Keep a connection to a server open for the transactions inside the block."""
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
