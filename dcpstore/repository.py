"""`Repository`: one catalog and one chunk storage, as users hold them.

Importing this module leaves torch and zarr unloaded; only what reads tensors loads them.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from dcpstore.catalog import Catalog
from dcpstore.errors import InvalidInputError, NotFoundError
from dcpstore.history import Diff, diff_versions
from dcpstore.journal import journaled
from dcpstore.places import absolute_data, locate
from dcpstore.records import (
    ChunkDefaults,
    EntryRecord,
    Operation,
    RefRecord,
    RepositoryRecord,
    Row,
    Version,
)
from dcpstore.storage.interface import Storage
from dcpstore.storage.packs import PackReader
from dcpstore.storage.urls import open_storage
from dcpstore.upkeep.upkept import Upkept

if TYPE_CHECKING:
    from dcpstore.reading.selection import Index
    from dcpstore.zarr_view.store import VersionStore

__all__ = ["Repository", "open", "opened"]


class Repository(Upkept):
    """A repository, opened; `dcpstore.open` makes one. Threads may share it.

    A `ref` is a version number (`12`, `"v12"`), a tag, a branch, `"main~3"`, `"main@step=1000"`, or
    None for the tip of `main`. Every method that takes one raises `NotFoundError` with the nearest
    names for an unknown ref.
    """

    def __init__(self, target: str, catalog: Catalog, storage: Storage) -> None:
        self._target = target
        self.catalog = catalog
        self.storage = storage
        self._finish: Callable[[], None] = lambda: None

    @property
    def about(self) -> RepositoryRecord:
        """What was settled when the repository was made."""
        return self.catalog.repository

    def log(self, ref: str | int | None = None, *, limit: int | None = None) -> list[Version]:
        """Return versions, newest first: all of them, or `ref` and its ancestors."""
        start = None if ref is None else self.show(ref).number
        return self.catalog.log(start, limit=limit)

    def show(self, ref: str | int | None = None) -> Version:
        """Return the version that `ref` names."""
        return self.catalog.resolve(ref)

    def entries(
        self, ref: str | int | None = None, fqns: Iterable[str] | None = None
    ) -> list[EntryRecord]:
        """Return what a version holds, by FQN: all entries, or those of `fqns`.

        Raises:
            NotFoundError: an FQN that the version lacks, with the nearest names.
        """
        wanted = None if fqns is None else list(fqns)
        return self.catalog.entries(self.show(ref).number, wanted)

    @journaled
    def tag(self, name: str, ref: str | int | None = None) -> RefRecord:
        """Name a version for good.

        Raises:
            AlreadyExistsError: the name is taken, by a tag or a branch.
        """
        return self.catalog.tag(name, self.show(ref).number, author=getpass.getuser())

    @journaled
    def branch(self, name: str, *, at: str | int | None = None) -> RefRecord:
        """Begin a branch at a version.

        Raises:
            AlreadyExistsError: the name is taken, by a branch or a tag.
        """
        return self.catalog.branch(name, self.show(at).number, author=getpass.getuser())

    @journaled
    def delete_tag(self, name: str, *, expect: str | int | None = None) -> RefRecord:
        """Remove a tag; return what it was. `undo` brings it back.

        Raises:
            ConflictError: it does not name the version `expect`.
        """
        return self._delete(name, "tag", expect)

    @journaled
    def delete_branch(self, name: str, *, expect: str | int | None = None) -> RefRecord:
        """Remove a branch, and none of its versions; return what it was. `undo` brings it back.

        Raises:
            ConflictError: its tip is not the version `expect`.
        """
        return self._delete(name, "branch", expect)

    @journaled
    def rollback(
        self,
        ref: str | int,
        *,
        branch: str = "main",
        force: bool = False,
        expect_tip: str | int | None = None,
    ) -> RefRecord:
        """Move a branch to an earlier version, so that the next save goes on from there.

        No version is deleted: `undo` moves the branch back.

        Args:
            ref: where to; an ancestor of the branch's tip, or any version with `force`.
            branch: what is moved.
            force: move it to a version that is no ancestor, such as one of another branch.
            expect_tip: the ref that the branch must still name.

        Raises:
            InvalidInputError: the version is no ancestor, and `force` is not given.
            ConflictError: the branch is not at `expect_tip`.
        """
        expected = None if expect_tip is None else self.show(expect_tip).number
        return self.catalog.history().roll_back(
            branch, ref, force=force, expect_tip=expected, author=getpass.getuser()
        )

    @journaled
    def undo(self, *, expect: int | None = None) -> Operation:
        """Take back the last operation on refs, metrics or labels that is not undone yet.

        Deleted tags and branches come back, moved branches go back. After a save the branch goes
        back and the tags go; the version stays. Called again, it goes further back.

        Args:
            expect: the number of the operation that is to be undone.

        Returns:
            The operation that this is.

        Raises:
            InvalidInputError: nothing is left to undo.
            NotFoundError: a ref would go back to a version that was expired.
            ConflictError: another operation came in; it is not number `expect`.
        """
        return self.catalog.history().undo(expect=expect, author=getpass.getuser())

    @journaled
    def add_metrics(self, ref: str | int | None, metrics: Mapping[str, float]) -> Version:
        """Add metrics to a version, such as those of a later evaluation.

        Raises:
            AlreadyExistsError: a metric is there with another value.
        """
        return self.catalog.history().add_metrics(ref, metrics, author=getpass.getuser())

    @journaled
    def add_labels(self, ref: str | int | None, labels: Mapping[str, str]) -> Version:
        """Add labels to a version.

        Raises:
            AlreadyExistsError: a label is there with another text.
        """
        return self.catalog.history().add_labels(ref, labels, author=getpass.getuser())

    def diff(self, old: str | int, new: str | int | None = None, *, stats: bool = False) -> Diff:
        """Return what changed from one version to another.

        Without `stats` it reads the catalog alone: contents are compared by digest. With it, each
        changed tensor is told in numbers, out of the chunks that differ.

        Raises:
            CorruptionError: with `stats`, stored bytes are damaged.
        """
        diff = diff_versions(self.catalog, self.show(old), self.show(new))
        if not stats:
            return diff
        from dcpstore.history.measuring import with_stats  # noqa: PLC0415 (loads torch)

        return with_stats(diff, self.catalog, self.storage)

    def tags(self) -> list[RefRecord]:
        """Return all tags, by name."""
        return self.catalog.refs("tag")

    def branches(self) -> list[RefRecord]:
        """Return all branches, by name."""
        return self.catalog.refs("branch")

    def operations(self, *, limit: int | None = None) -> list[Operation]:
        """Return what was done to the repository, newest first."""
        return self.catalog.operations(limit=limit)

    def read(
        self,
        ref: str | int | None = None,
        fqns: Iterable[str] | Mapping[str, Index] | None = None,
        *,
        verify: bool = True,
        allow_pickle: bool = False,
    ) -> dict[str, Any]:
        """Return tensors (plain, on the CPU) and values of a version by FQN, without a template.

        Args:
            ref: the version.
            fqns: which entries; a mapping gives each tensor an index (integers, slices, `...`), and
                only the chunks that it meets are read. None is everything.
            verify: check every byte read against its digest.
            allow_pickle: let values that are pickles run their code.

        Raises:
            NotFoundError: an FQN that the version lacks, with the nearest names.
            InvalidInputError: an index that does not fit the tensor's shape.
            CorruptionError: stored bytes are damaged.
        """
        from dcpstore.reading.selection import read_entries  # noqa: PLC0415 (loads torch)

        if isinstance(fqns, str):
            raise InvalidInputError(f"fqns={fqns!r} is one text; pass a list: [{fqns!r}].")
        version = self.show(ref)
        with closing(PackReader(self.storage)) as packs:
            return read_entries(
                self.catalog.entries(version.number, None if fqns is None else list(fqns)),
                fqns if isinstance(fqns, Mapping) else {},
                self.catalog,
                packs,
                version=version.number,
                verify=verify,
                allow_pickle=allow_pickle,
            )

    def zarr(self, ref: str | int | None = None, *, verify: bool = True) -> VersionStore:
        """Return a version as a read-only Zarr v3 store, for `zarr.open_group`.

        Each tensor is an array named by its FQN; values are attributes of the group.
        """
        from dcpstore.zarr_view.store import VersionStore  # noqa: PLC0415 (loads zarr)

        version = self.show(ref)
        return VersionStore(
            str(version),
            self.catalog.entries(version.number),
            attributes={"version": version.number, "uid": version.uid, "step": version.step},
            find=self.catalog.chunks,
            read=PackReader(self.storage).read,
            verify=verify,
        )

    def sql(self, query: str, /, **params: object) -> list[Row]:
        """Return the named rows of a query, on a connection that cannot write.

        `:name` in the query stands for `params["name"]`. The views are `history`, `entries`,
        `storage`, `operations` and `metrics`.

        Raises:
            InvalidInputError: what the database says is wrong, or a statement that is no query.
        """
        return self.catalog.query(query, params)

    def finish_before_close(self, finish: Callable[[], None]) -> None:
        """Have `finish` called by `close`: it ends what still uses this repository."""
        self._finish = finish

    def close(self) -> None:
        """Close the database connections.

        Raises:
            DcpstoreError: an asynchronous save failed and nobody has asked for its result.
        """
        try:
            self._finish()
        finally:
            self.catalog.close()

    def _delete(
        self, name: str, kind: Literal["tag", "branch"], expect: str | int | None
    ) -> RefRecord:
        expected = None if expect is None else self.show(expect).number
        return self.catalog.history().delete_ref(
            name, kind, expect=expected, author=getpass.getuser()
        )

    def __enter__(self) -> Repository:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self._target,)

    def __repr__(self) -> str:
        return f"Repository({self.catalog!r}, data={self.storage.url!r})"


def open(
    target: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    create: bool = True,
    chunk: ChunkDefaults | None = None,
) -> Repository:
    """Open a repository, or make a new one where there is none.

    Args:
        target: a folder, for a catalog in its `catalog.db` (SQLite) with the chunks beside it; or a
            database URL, such as `postgresql+psycopg://user@host/database`.
        data: where the chunks lie, a path or `s3://bucket/prefix`. A new repository needs it where
            the target is a URL, and keeps it in its catalog; later it may be left out.
        create: False raises NotFoundError where there is no repository.
        chunk: how a new repository cuts and encodes tensors.

    Raises:
        NotFoundError: no repository, no database server, or no data folder.
        InvalidInputError: `data` is missing, or not what the repository keeps.
        SchemaError: a database that is not ours, older or newer; the message names the cure.
    """
    url, folder = locate(os.fspath(target))
    data_url = None if data is None else absolute_data(os.fspath(data))
    try:
        catalog = Catalog.open(url, create=False, data_url=data_url)
    except NotFoundError:
        if not create:
            raise
        catalog = _make(url, folder, data_url, chunk)
    try:
        storage = open_storage(catalog.repository.data_url, base=folder)
    except BaseException:
        catalog.close()
        raise
    return Repository(os.fspath(target), catalog, storage)


def _reopen(target: str) -> Repository:
    """Open what another process had open."""
    return open(target, create=False)


@contextmanager
def opened(repo: Repository | str | os.PathLike[str], *, create: bool) -> Iterator[Repository]:
    """Yield a repository, given open or by what `open` takes; only the latter is closed after."""
    if isinstance(repo, Repository):
        yield repo
    else:
        with open(repo, create=create) as made:
            yield made


def _make(
    url: str, folder: Path | None, data_url: str | None, chunk: ChunkDefaults | None
) -> Catalog:
    if data_url is None and folder is not None:
        data_url = "."  # relative to the catalog, so that the folder can move as a whole
    if data_url is not None:
        open_storage(data_url, base=folder, create=True)
    return Catalog.open(url, create=True, data_url=data_url, chunk=chunk)
