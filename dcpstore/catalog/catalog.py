"""`Catalog`: the one door to the database; each method is one transaction."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

from dcpstore.catalog import journal, known, operations, queries, refs, saves, sql
from dcpstore.catalog.engine import Database
from dcpstore.catalog.history import History
from dcpstore.catalog.lifecycle import open_repository, restore_repository, upgrade_schema
from dcpstore.catalog.rebuilding import Contents, Restored, restore
from dcpstore.catalog.upkeep import Upkeep
from dcpstore.records import (
    ChunkDefaults,
    ChunkPlace,
    ChunkRange,
    EntryRecord,
    Operation,
    PlanRecord,
    RefRecord,
    RepositoryRecord,
    Row,
    StoredChunk,
    TensorRecord,
    Version,
    VersionContent,
    VersionDraft,
)

__all__ = ["Catalog"]


class Catalog:
    """The catalog of one repository; threads may share it.

    Attributes:
        repository: the one row about the repository, as it was when the catalog was opened.
    """

    def __init__(self, database: Database, repository: RepositoryRecord) -> None:
        self._database = database
        self.repository = repository

    @classmethod
    def open(
        cls,
        url: str,
        *,
        create: bool,
        data_url: str | None = None,
        chunk: ChunkDefaults | None = None,
    ) -> Catalog:
        """Open the catalog at a database URL; an empty database becomes one if `create`.

        Args:
            url: `sqlite:///path` (see `sqlite_url`) or `postgresql://user@host/database`.
            create: whether nothing there is reason to create, or to raise NotFoundError.
            data_url: where packs and manifests lie; needed by a new catalog, checked by an old one.
            chunk: how a new repository cuts and encodes; an old one has its own.

        Raises:
            NotFoundError: there is no catalog, or no way to it.
            InvalidInputError: the URL cannot be meant, or `data_url` is missing or another.
            SchemaError: the database is not ours, older or newer; the message names the cure.
        """
        database = Database(url)
        try:
            repository = open_repository(database, create=create, data_url=data_url, chunk=chunk)
        except BaseException:
            database.close()
            raise
        return cls(database, repository)

    @staticmethod
    def upgrade(url: str) -> tuple[str, str]:
        """Bring an older catalog's tables to those of today; return the revisions (from, to).

        Raises:
            NotFoundError: there is no catalog.
            SchemaError: the database is not ours, or newer than this dcpstore.
        """
        database = Database(url)
        try:
            return upgrade_schema(database)
        finally:
            database.close()

    @staticmethod
    def rebuild(
        url: str,
        repository: RepositoryRecord,
        operations: Iterable[Mapping[str, Any]],
        contents: Contents,
    ) -> Restored:
        """Make a catalog from the operations of a journal and what the manifests hold.

        Raises:
            AlreadyExistsError: the database is not empty.
        """
        database = Database(url)
        try:
            return restore_repository(
                database, repository, lambda connection: restore(connection, operations, contents)
            )
        finally:
            database.close()

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

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
        return f"Catalog({self._database.shown!r})"

    # Saves

    def begin(self, draft: VersionDraft) -> None:
        """Store a version as pending; raises now what its commit would raise for its names."""
        with self._database.write() as connection:
            saves.begin_save(connection, draft)

    def commit(self, uid: str, content: VersionContent) -> Version:
        """Make a pending version visible, whole, in this one transaction.

        Its packs and manifest must be durable already (invariant 2).
        """
        with self._database.write() as connection:
            return saves.commit_save(connection, uid, content)

    def abort(self, uid: str, error: str) -> None:
        """Give up a pending version and keep the reason; a second time does nothing."""
        with self._database.write() as connection:
            saves.abort_save(connection, uid, error)

    def touch(self, uid: str) -> None:
        """Renew the lease of a pending version, by which gc tells a running save from a crash."""
        with self._database.write() as connection:
            saves.touch_save(connection, uid)

    def find_chunks(self, digests: Collection[bytes], codec: str) -> dict[bytes, ChunkPlace]:
        """Return where chunks with these digests lie in live packs, encoded with `codec`."""
        with self._database.read() as connection:
            return known.find_chunks(connection, digests, codec)

    def find_tensors(self, digests: Collection[str]) -> dict[str, TensorRecord]:
        """Return what the repository holds of these contents, whole and in live packs."""
        with self._database.read() as connection:
            return known.find_tensors(connection, digests)

    # Refs

    def resolve(self, ref: str | int | None) -> Version:
        """Return the version that a ref means; None is the tip of `main`."""
        with self._database.read() as connection:
            return refs.resolve(connection, ref)

    def tag(self, name: str, version: int, *, author: str) -> RefRecord:
        """Name a version for good."""
        with self._database.write() as connection:
            return refs.make_ref(connection, name, "tag", version=version, author=author)

    def branch(self, name: str, version: int, *, author: str) -> RefRecord:
        """Begin a branch at a version."""
        with self._database.write() as connection:
            return refs.make_ref(connection, name, "branch", version=version, author=author)

    def refs(self, kind: Literal["tag", "branch"] | None = None) -> list[RefRecord]:
        """Return the tags and branches, or one kind of them, sorted by name."""
        with self._database.read() as connection:
            return refs.list_refs(connection, kind)

    # Reading

    def log(self, start: int | None = None, *, limit: int | None = None) -> list[Version]:
        """Return versions, newest first: all, or `start` and its ancestors by parent."""
        with self._database.read() as connection:
            return queries.list_log(connection, start, limit=limit)

    def entries(self, version: int, fqns: Collection[str] | None = None) -> list[EntryRecord]:
        """Return the entries of a version, or those of `fqns`, sorted by FQN."""
        with self._database.read() as connection:
            return queries.load_entries(connection, version, fqns)

    def chunks(self, wanted: Sequence[ChunkRange]) -> list[StoredChunk]:
        """Return the chunks of these ranges, each once, sorted by pack and offset."""
        with self._database.read() as connection:
            return queries.load_chunks(connection, wanted)

    def plan(self, version: int) -> PlanRecord:
        """Return the global plan by which a version was saved."""
        with self._database.read() as connection:
            return queries.load_plan(connection, version)

    def planner_data(self, version: int) -> str | None:
        """Return what a custom planner kept with a version, as typed JSON."""
        with self._database.read() as connection:
            return queries.load_planner_data(connection, version)

    def operations(self, *, limit: int | None = None) -> list[Operation]:
        """Return what was done to the repository, newest first."""
        with self._database.read() as connection:
            return operations.list_operations(connection, limit=limit)

    def history(self) -> History:
        """Return the statements that diff, rollback and undo are made of."""
        return History(self._database)

    # Upkeep

    def unjournaled(self) -> list[dict[str, Any]]:
        """Return the oldest operations that the data folder may lack, as the journal says them."""
        with self._database.read() as connection:
            return journal.unjournaled(connection)

    def mark_journaled(self, number: int) -> None:
        """Note that all operations up to `number` are durable in the data folder."""
        with self._database.write() as connection:
            journal.mark_journaled(connection, number)

    def upkeep(self) -> Upkeep:
        """Return the statements that expire, gc, verify and copy are made of."""
        return Upkeep(self._database)

    def query(self, sql_text: str, params: Mapping[str, object]) -> list[Row]:
        """Return the rows of one SQL query, on a connection that cannot write."""
        return sql.run_query(self._database, sql_text, params)
