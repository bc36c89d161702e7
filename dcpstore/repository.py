"""`Repository`: one catalog and one chunk storage, as users hold them.

Importing this module leaves torch and zarr unloaded; only what reads tensors loads them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dcpstore.catalog import Catalog
from dcpstore.catalog.location import absolute_data, absolute_target, check_path, locate
from dcpstore.catalog.maintenance.journal_files import journaled, write_journal
from dcpstore.catalog.validation import check_chunk
from dcpstore.catalog.write.operations import this_user
from dcpstore.errors import AlreadyExistsError, DcpstoreError, InvalidInputError, NotFoundError
from dcpstore.formats.composition import ComposedEntry, Entry, fold_entries, outer_fqns
from dcpstore.history.recorded import Recorded
from dcpstore.maintenance.upkept import Upkept
from dcpstore.records import (
    ChunkDefaults,
    EntryRecord,
    RefRecord,
    RepositoryRecord,
    Row,
    RunningSave,
    Version,
)
from dcpstore.storage.interface import Storage
from dcpstore.storage.local import LocalFolder
from dcpstore.storage.packs import PackReader
from dcpstore.storage.urls import open_storage

if TYPE_CHECKING:
    from dcpstore.reading.selection import Index
    from dcpstore.saving.plan_exchange import PlanMemory
    from dcpstore.zarr.store import VersionStore

__all__ = ["Repository", "make", "matching_entries", "open", "opened"]


class Repository(Recorded, Upkept):
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

    @cached_property
    def memory(self) -> PlanMemory:
        """What this process remembers of its saves here, so that the next one exchanges less."""
        from dcpstore.saving.plan_exchange import PlanMemory  # noqa: PLC0415 (loads torch)

        return PlanMemory()

    @property
    def location(self) -> str | Path:
        """The folder, or the database URL without its password: what torch's planners are given
        as `checkpoint_id`.
        """
        return self.catalog.shown if "://" in self._target else Path(self._target)

    @property
    def about(self) -> RepositoryRecord:
        """What was settled when the repository was made."""
        return self.catalog.repository

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
        return self._entries(self.show(ref).number, _as_list(fqns))

    def _entries(self, number: int, wanted: list[str] | None) -> list[EntryRecord]:
        """Return entries of a version; of a composed tensor that is wanted, its mark and parts."""
        try:
            return self.catalog.entries(number, wanted)
        except NotFoundError:
            every = self.catalog.entries(number)
            parts: dict[str, list[str]] = {}
            for part, fqn in outer_fqns(entry.fqn for entry in every).items():
                parts.setdefault(fqn, []).append(part)
            if parts.keys().isdisjoint(wanted or ()):
                raise
        listed = [name for fqn in wanted or () for name in parts.get(fqn, [fqn])]
        return self.catalog.entries(number, listed)

    @journaled
    def tag(self, name: str, ref: str | int | None = None, *, move: bool = False) -> RefRecord:
        """Name a version.

        Args:
            name: of the tag.
            ref: the version.
            move: let a tag of this name move to the version, in one operation that `undo` takes
                back. Where there is no such tag, it is made.

        Raises:
            InvalidInputError: the name breaks the grammar; offers the nearest that is allowed.
            AlreadyExistsError: the name is taken, with `move` by a branch.
        """
        return self.catalog.tag(name, self.show(ref).number, author=this_user(), move=move)

    @journaled
    def branch(self, name: str, *, at: str | int | None = None) -> RefRecord:
        """Begin a branch at a version.

        Raises:
            AlreadyExistsError: the name is taken, by a branch or a tag.
        """
        return self.catalog.branch(name, self.show(at).number, author=this_user())

    def tags(self) -> list[RefRecord]:
        """Return all tags, by name."""
        return self.catalog.refs("tag")

    def branches(self) -> list[RefRecord]:
        """Return all branches, by name."""
        return self.catalog.refs("branch")

    def read(
        self,
        ref: str | int | None = None,
        fqns: str | Iterable[str] | Mapping[str, Index] | None = None,
        *,
        nested: bool = False,
        verify: bool = True,
        allow_pickle: bool = False,
    ) -> dict[str, Any]:
        """Return tensors (plain, on the CPU) and values of a version by FQN, without a template.

        Args:
            ref: the version.
            fqns: which entries. A text is the name of an entry or of all below it ("model"), or a
                glob of FQNs ("*.bias"). A list names entries; a mapping also gives each tensor an
                index (integers, slices, `...`), and only the chunks that it meets are read. None is
                everything.
            nested: return the nested state as it was saved instead, from its top on: its
                containers, empty ones too, with their own keys; `["optim"]` of it is what
                `optim.load_state_dict` takes. Named tuples come as tuples, dataclasses as dicts,
                and what is not read of a list as None.
            verify: check every byte read against its digest.
            allow_pickle: let values that are pickles run their code.

        Raises:
            NotFoundError: an FQN that the version lacks, or a text that none matches, with the
                nearest names.
            InvalidInputError: an index that does not fit the tensor's shape.
            CorruptionError: stored bytes are damaged, or paths that no nested state has.
        """
        from dcpstore.reading.selection import read_entries  # noqa: PLC0415 (loads torch)
        from dcpstore.state.tree import nested_state, path_above  # noqa: PLC0415 (loads torch)

        version = self.show(ref)
        if isinstance(fqns, str):
            entries = self._matching(version, fqns)
        else:
            entries = self._entries(version.number, _as_list(fqns))
        with closing(PackReader(self.storage)) as packs:
            found = read_entries(
                entries,
                fqns if isinstance(fqns, Mapping) else {},
                self.catalog,
                packs,
                version=version.number,
                verify=verify,
                allow_pickle=allow_pickle,
            )
        if not nested:
            return found
        paths = {
            one.fqn: path_above(one.mark.path, len(one.path))
            if isinstance(one, ComposedEntry)
            else one.path
            for one in fold_entries(entries)
        }
        state: dict[str, Any] = nested_state(found, paths)
        return state

    def _matching(self, version: Version, pattern: str) -> list[EntryRecord]:
        """Return the entries that a text stands for."""
        entries = fold_entries(self.catalog.entries(version.number))
        chosen: list[EntryRecord] = []
        for one in matching_entries(entries, pattern, where=str(version)):
            chosen += [one.mark, *one.parts] if isinstance(one, ComposedEntry) else [one]
        return chosen

    def zarr(self, ref: str | int | None = None, *, verify: bool = True) -> VersionStore:
        """Return a version as a read-only Zarr v3 store, for `zarr.open_group`.

        Each tensor is an array named by its FQN; values are attributes of the group.
        """
        from dcpstore.zarr.store import VersionStore  # noqa: PLC0415 (loads zarr)

        version = self.show(ref)
        return VersionStore(
            str(version),
            self.catalog.entries(version.number),
            attributes={"version": version.number, "uid": version.uid, "step": version.step},
            find=self.catalog.chunks,
            read=PackReader(self.storage).read,
            verify=verify,
        )

    def status(self) -> list[RunningSave]:
        """Return the saves that have begun and not ended, with how far their ranks are."""
        return self.catalog.running()

    def sql(self, query: str, /, **params: object) -> list[Row]:
        """Return the named rows of a query, on a connection that cannot write.

        `:name` in the query stands for `params["name"]`; a time without zone is in UTC, as those of
        the views are. The views are `history`, `entries`,
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
        AlreadyExistsError: a new repository's data folder holds another's data.
    """
    target = absolute_target(target)
    url, folder = locate(target)
    data_url = _data_url(data)
    try:
        catalog = Catalog.open(url, data_url=data_url)
    except NotFoundError as error:
        if not create:
            if folder is not None and (advice := _advise(folder)):
                raise NotFoundError(advice) from error
            raise
        try:
            return make(target, data=data, chunk=chunk)
        except AlreadyExistsError as taken:
            try:
                catalog = Catalog.open(url, data_url=data_url)  # another process was faster
            except NotFoundError:
                raise taken from None
    return _with_storage(target, catalog)


def _advise(folder: Path) -> str:
    """Return what to do with a folder that has no catalog, and holds what people look for."""
    if (folder / ".metadata").is_file():
        return (
            f"the folder {os.fspath(folder)!r} holds a checkpoint of "
            "torch.distributed.checkpoint, and no repository. 'dcpstore import' stores it "
            "as a version; torch's own FileSystemReader loads it as it is, as the "
            "storage_reader= of dcpstore.load too."
        )
    with suppress(DcpstoreError, OSError):
        if any(LocalFolder(folder).list("operations")):
            return (
                f"no repository at {folder}: its data are there, but its catalog is gone. Restore "
                f"the catalog with 'dcpstore rebuild {folder} --into {folder}'."
            )
    return ""


def make(
    target: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None,
    chunk: ChunkDefaults | None,
) -> Repository:
    """Make a new repository; no catalog is left where that fails, an empty file at most.

    Args:
        target, data, chunk: as for `open`.

    Raises:
        AlreadyExistsError: there is one, perhaps of a process that was faster; or the data folder
            holds another's data.
        InvalidInputError: `data` is missing, or `chunk` cannot be meant.
        NotFoundError: no database server.
        SchemaError: a database that is neither empty nor ours.
    """
    target = absolute_target(target)
    url, folder = locate(target)
    data_url = _data_url(data)
    if chunk is not None:
        check_chunk(chunk)
    if folder is not None:
        LocalFolder(folder, create=True)  # for the catalog itself
        # relative to the catalog, so that the folder can move as a whole
        data_url = data_url or "."
    catalog = Catalog.make(
        url,
        data_url=data_url,
        chunk=chunk,
        make_data=lambda: _make_data(data_url or "", folder),
    )
    made = _with_storage(target, catalog)
    with catalog.kept():
        write_journal(catalog, made.storage)  # from now on the folder says whose it is
    return made


def matching_entries(entries: Sequence[Entry], pattern: str, *, where: str) -> list[Entry]:
    """Return the entries that a text stands for: by name, all below it, or by a glob of FQNs.

    Raises:
        NotFoundError: none, with the nearest names; `where` is the version.
    """
    found = [
        one
        for one in entries
        if one.fqn == pattern or one.fqn.startswith(f"{pattern}.") or fnmatchcase(one.fqn, pattern)
    ]
    if not found:
        raise NotFoundError.near(
            f"entry of {where} that matches",
            pattern,
            [one.fqn for one in entries],
            f"See 'dcpstore ls {where}' for all of them.",
        )
    return found


def _as_list(fqns: Iterable[str] | None) -> list[str] | None:
    """Return FQNs as a list; None is all of them.

    Raises:
        InvalidInputError: they are one text, or no texts.
    """
    if fqns is None:
        return None
    if isinstance(fqns, str):
        raise InvalidInputError(f"fqns={fqns!r} is one text; pass a list: [{fqns!r}].")
    if not isinstance(fqns, Iterable):
        raise InvalidInputError(f"fqns={fqns!r} is no list; pass the names of entries.")
    named = list(fqns)
    odd = [fqn for fqn in named if not isinstance(fqn, str)]
    if odd:
        raise InvalidInputError(f"{odd[0]!r} is no FQN; give the names that 'dcpstore ls' shows.")
    return named


def _data_url(data: str | os.PathLike[str] | None) -> str | None:
    return None if data is None else absolute_data(check_path(data, what="data"))


def _make_data(data_url: str, folder: Path | None) -> None:
    """Make the place of a new repository's data, where no other's lies."""
    storage = open_storage(data_url, base=folder, create=True)
    if any(storage.list("operations")):
        raise AlreadyExistsError(
            f"{storage.url!r} holds the data of a repository that has another catalog, or had one "
            "here; nothing was changed. Give another data folder, or restore a lost catalog with "
            "'dcpstore rebuild'."
        )


def _with_storage(target: str, catalog: Catalog) -> Repository:
    try:
        storage = open_storage(catalog.repository.data_url, base=catalog.folder)
    except BaseException:
        catalog.close()
        raise
    return Repository(target, catalog, storage)


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
