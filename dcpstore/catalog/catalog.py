"""`Catalog`: the one door to the database; each method is one transaction."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from dcpstore.catalog.db.database import Database
from dcpstore.catalog.history_methods import History
from dcpstore.catalog.maintenance import journal
from dcpstore.catalog.maintenance.restore import Contents, Restored, restore
from dcpstore.catalog.read import dedup as known
from dcpstore.catalog.read import entries as queries
from dcpstore.catalog.read import user_sql as sql
from dcpstore.catalog.schema.lifecycle import (
    create_repository,
    open_repository,
    restore_repository,
    upgrade_schema,
)
from dcpstore.catalog.upkeep_methods import Upkeep
from dcpstore.catalog.write import lease as running
from dcpstore.catalog.write import operations, refs, saves
from dcpstore.records import (
    ChunkDefaults,
    ChunkPlace,
    ChunkRange,
    EntryRecord,
    Operation,
    PlanRecord,
    RankProgress,
    RefRecord,
    RepositoryRecord,
    Row,
    RunningSave,
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

    @property
    def folder(self) -> Path | None:
        """The folder of its file, from which relative places of data count; None on a server."""
        file = self._database.file
        return None if file is None else file.parent

    @property
    def shown(self) -> str:
        """The database URL for people to read: no password, and no option that may hold one."""
        return self._database.shown

    @classmethod
    def open(cls, url: str, *, data_url: str | None = None) -> Catalog:
        """Open the catalog at a database URL.

        Args:
            url: `sqlite:///path` (see `sqlite_url`) or `postgresql://user@host/database`.
            data_url: where its packs and manifests must lie.

        Raises:
            NotFoundError: there is no catalog, or no way to it.
            InvalidInputError: the URL cannot be meant, or its data lie elsewhere.
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
            InvalidInputError: the URL cannot be meant, or `data_url` is missing.
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

    def kept(self) -> AbstractContextManager[None]:
        """Keep a connection to a server for what is asked inside the block; outside none is."""
        return self._database.kept()

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

    # Saves

    def begin(self, draft: VersionDraft) -> None:
        """Store a version as pending; raises now what its commit would raise for its names."""
        self._database.change_once(
            lambda connection: saves.begin_save(connection, draft),
            lambda connection: saves.find_begun(connection, draft.uid),
        )

    def commit(self, uid: str, content: VersionContent) -> Version:
        """Make a pending version visible, whole, in this one transaction.

        Its packs and manifest must be durable already (invariant 2). Where the database's answer
        is lost, it is asked whether the version is there.
        """
        return self._database.change_once(
            lambda connection: saves.commit_save(connection, uid, content),
            lambda connection: saves.find_committed(connection, uid),
        )

    def abort(self, uid: str, error: str) -> None:
        """Give up a pending version and keep the reason; a second time does nothing."""
        self._database.change_again(saves.abort_save, uid, error)

    def touch(self, uid: str, progress: Sequence[RankProgress] = ()) -> None:
        """Renew the lease of a pending version, by which gc tells a running save from a crash.

        `progress` is how far its ranks are, for `running`.
        """
        self._database.change_again(running.touch_save, uid, progress)

    def running(self) -> list[RunningSave]:
        """Return the saves that have begun and not ended, the oldest first."""
        return self._database.ask(running.list_running)

    def find_chunks(
        self, digests: Collection[bytes], codec: str | None = None
    ) -> dict[bytes, ChunkPlace]:
        """Return where chunks with these digests lie in live packs, encoded with `codec` or any."""
        return self._database.ask(known.find_chunks, digests, codec)

    def find_tensors(self, digests: Collection[str]) -> dict[str, TensorRecord]:
        """Return what the repository holds of these contents, whole and in live packs."""
        return self._database.ask(known.find_tensors, digests)

    # Refs

    def resolve(self, ref: str | int | None) -> Version:
        """Return the version that a ref means; None is the tip of `main`."""
        return self._database.ask(refs.resolve, ref)

    def tag(self, name: str, version: int, *, author: str, move: bool = False) -> RefRecord:
        """Name a version; with `move`, a tag of this name moves to it."""
        return self._database.change(
            refs.make_ref, name, "tag", version=version, author=author, move=move
        )

    def branch(self, name: str, version: int, *, author: str) -> RefRecord:
        """Begin a branch at a version."""
        return self._database.change(refs.make_ref, name, "branch", version=version, author=author)

    def refs(self, kind: Literal["tag", "branch"] | None = None) -> list[RefRecord]:
        """Return the tags and branches, or one kind of them, sorted by name."""
        return self._database.ask(refs.list_refs, kind)

    # Reading

    def find_refs(self, names: Collection[str]) -> set[str]:
        """Return those of these names that a branch or tag has."""
        return set(self._database.ask(refs.find_refs, names))

    def log(self, start: int | None = None, *, limit: int | None = None) -> list[Version]:
        """Return versions, newest first: all, or `start` and its ancestors by parent."""
        return self._database.ask(queries.list_log, start, limit=limit)

    def entries(self, version: int, fqns: Collection[str] | None = None) -> list[EntryRecord]:
        """Return the entries of a version, or those of `fqns`, sorted by FQN."""
        return self._database.ask(queries.load_entries, version, fqns)

    def chunks(self, wanted: Sequence[ChunkRange]) -> list[StoredChunk]:
        """Return the chunks of these ranges, each once, sorted by pack and offset."""
        return self._database.ask(queries.load_chunks, wanted)

    def plan(self, version: int) -> PlanRecord:
        """Return the global plan by which a version was saved."""
        return self._database.ask(queries.load_plan, version)

    def planner_data(self, version: int) -> str | None:
        """Return what a custom planner kept with a version, as typed JSON."""
        return self._database.ask(queries.load_planner_data, version)

    def operations(self, *, limit: int | None = None) -> list[Operation]:
        """Return what was done to the repository, newest first."""
        return self._database.ask(operations.list_operations, limit=limit)

    def history(self) -> History:
        """Return the statements that diff, rollback and undo are made of."""
        return History(self._database)

    # Upkeep

    def unjournaled(self) -> list[dict[str, Any]]:
        """Return the oldest operations that the data folder may lack, as the journal says them."""
        return self._database.ask(journal.unjournaled)

    def mark_journaled(self, number: int) -> None:
        """Note that all operations up to `number` are durable in the data folder."""
        self._database.change_again(journal.mark_journaled, number)

    def upkeep(self) -> Upkeep:
        """Return the statements that expire, gc, verify and copy are made of."""
        return Upkeep(self._database)

    def query(self, sql_text: str, params: Mapping[str, object]) -> list[Row]:
        """Return the rows of one SQL query, on a connection that cannot write."""
        return self.table(sql_text, params)[1]

    def table(self, sql_text: str, params: Mapping[str, object]) -> sql.Table:
        """Return the columns of such a query too, which are there without any row."""
        return sql.run_query(self._database, sql_text, params)
