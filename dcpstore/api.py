"""`save` and `load`: one call on every rank, as in torch.distributed.checkpoint.

Torch's older argument forms are accepted. Invariant: a value given in the place of another argument
is refused, with the name of the argument that it belongs to, before anything is opened.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any, Unpack, overload

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.state_dict_saver import save as torch_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from dcpstore.catalog.location import absolute_target
from dcpstore.catalog.read.ref_lookup import DEFAULT_BRANCH, find_refs
from dcpstore.collectives import alone_in, find_collectives
from dcpstore.compat.torch_private import newer_arguments
from dcpstore.core.syntax import Ref, parse_ref, rank_name
from dcpstore.errors import DcpstoreError, InvalidInputError, NotFoundError
from dcpstore.loading.load_pipeline import LoadSource, load_version
from dcpstore.planning import DefaultLoadPlanner
from dcpstore.planning.save_planner import planner_of
from dcpstore.records import LoadReport, RefLike, Version
from dcpstore.repository import Repository, opened
from dcpstore.saving.commit import SaveTarget
from dcpstore.saving.request import (
    SaveOptions,
    SaveRequest,
    check_options,
    make_request,
    own_request,
    shows_options,
)
from dcpstore.saving.save_pipeline import save_version
from dcpstore.saving.staging import raise_unseen
from dcpstore.state.load_options import LoadOptions, OnDtype, Rename

__all__ = [
    "RepositoryLike",
    "check_planner",
    "check_ref",
    "check_unused",
    "load",
    "save",
    "taken_reader",
    "taken_writer",
    "target_of",
    "where_given",
]

RepositoryLike = Repository | str | os.PathLike[str]

# Objects that callers pass in the wrong place, and where each belongs.
_MEANT_FOR: tuple[tuple[type, str], ...] = (
    (StorageWriter, "pass it as storage_writer= to save or async_save"),
    (StorageReader, "pass it as storage_reader= to load"),
    (SavePlanner, "pass it as planner= to save or async_save"),
    (LoadPlanner, "pass it as planner= to load"),
    (Repository, "pass it as the repository"),
    (Version, "pass the repository, and for a load the version as ref"),
    (Metadata, "it describes a checkpoint and holds none; pass where the checkpoint is"),
    (dist.ProcessGroup, "pass it as process_group="),
)


def taken_writer(
    call: str, repo: RepositoryLike | StorageWriter | None, writer: StorageWriter | None
) -> tuple[RepositoryLike | None, StorageWriter | None]:
    """Return the repository and the writer that a call is given.

    In torch's first releases the storage was the second argument. We accept that too.

    Raises:
        InvalidInputError: two writers are given, or what is given is not a writer.

    Warns:
        UserWarning: the writer is given in the place of the repository.
    """
    return _taken(call, repo, writer, "storage_writer", StorageWriter)


def taken_reader(
    call: str, repo: RepositoryLike | StorageReader | None, reader: StorageReader | None
) -> tuple[RepositoryLike | None, StorageReader | None]:
    """Return the repository and the reader that a call is given, as `taken_writer`."""
    return _taken(call, repo, reader, "storage_reader", StorageReader)


def _taken(call: str, repo: Any, storage: Any, name: str, kind: type) -> tuple[Any, Any]:
    if isinstance(repo, kind):
        if storage is not None:
            raise InvalidInputError(f"{call} is given two storages; pass one, as {name}=.")
        warnings.warn(
            f"The argument order of {call} has been changed. Please check the document to avoid "
            f"future breakages: give the storage by its name, {name}=.",
            stacklevel=4,  # the line of the caller
        )
        repo, storage = None, repo
    if storage is not None and not isinstance(storage, kind):
        is_place = isinstance(storage, str | os.PathLike)
        _check_meant(name, storage, "pass it as the repository" if is_place else "")
    return repo, storage


def where_given(
    call: str, repo: RepositoryLike | None, checkpoint_id: str | os.PathLike[str] | None
) -> RepositoryLike:
    """Return the repository that a caller of `call` names, by torch's argument or by ours.

    Raises:
        InvalidInputError: neither of them is given, or both are, or what is given is not a place.
    """
    if (repo is None) == (checkpoint_id is None):
        raise InvalidInputError(
            f"{'neither' if repo is None else 'both'} of repo and checkpoint_id are given; pass "
            "one of them: a Repository, a folder or a database URL."
        )
    if isinstance(repo, Repository):
        return repo
    if isinstance(repo, Mapping):
        raise InvalidInputError(
            f"the repository is a {type(repo).__name__}; pass the state first, then the "
            f"repository: {call}(state, repo)."
        )
    named = checkpoint_id if repo is None else repo
    assert named is not None, "one of them is given"
    _check_meant("checkpoint_id" if repo is None else "repo", named)
    return absolute_target(named)  # an asynchronous save opens it later, perhaps from elsewhere


def check_planner(planner: object, kind: type[LoadPlanner] | type[SavePlanner]) -> None:
    """Check that what is given as planner is a planner of this kind, if anything is given.

    Raises:
        InvalidInputError: it is.
    """
    if planner is not None and not isinstance(planner, kind):
        _check_meant("planner", planner, f"pass a {kind.__name__}" if _is_plain(planner) else "")


def check_ref(ref: object) -> None:
    """Check that a ref is not what another argument is for.

    Raises:
        InvalidInputError: it is.
    """
    if ref is not None and not isinstance(ref, Version):
        _check_meant("ref", ref)


def check_unused(storage: str, /, *named: str, **given: bool) -> None:
    """Check that a call on another storage has no argument that only a repository can honour.

    Raises:
        InvalidInputError: some are `named`, or are `given`.
    """
    names = [*named, *(name for name, is_given in given.items() if is_given)]
    if names:
        raise InvalidInputError(
            f"{', '.join(names)}: for a repository only, and {storage} names another storage; "
            f"leave them out, or give a repository in the place of {storage}."
        )


def _check_meant(name: str, given: object, instead: str = "") -> None:
    """Check that what is given as `name` does not belong to another argument."""
    if isinstance(given, type):
        instead = f"pass an object: {given.__name__}(...)"
    instead = next((use for kind, use in _MEANT_FOR if isinstance(given, kind)), instead)
    if instead:
        raise InvalidInputError(f"{name} is {_shown(given)}; {instead}.")


def _is_plain(given: object) -> bool:
    return isinstance(given, str | os.PathLike | int | float | bool | dict | list)


def _shown(given: object) -> str:
    if isinstance(given, type):
        return f"the class {given.__name__}"
    is_short = isinstance(given, str | os.PathLike | int)
    return repr(given) if is_short else f"a {type(given).__name__}"


@overload
def save(
    state_dict: dict[str, Any],
    *,
    storage_writer: StorageWriter,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    checkpoint_id: str | os.PathLike[str] | None = None,
) -> Metadata: ...


@overload
def save(
    state_dict: dict[str, Any],
    repo: RepositoryLike | None = None,
    *,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    allow_pickle: bool = False,
    checkpoint_id: str | os.PathLike[str] | None = None,
    **options: Unpack[SaveOptions],
) -> Version: ...


@shows_options(SaveOptions)
def save(
    state_dict: dict[str, Any],
    repo: RepositoryLike | None = None,
    *,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    allow_pickle: bool = False,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    use_collectives: bool = True,
    **options: Unpack[SaveOptions],
) -> Version | Metadata:
    """Save a state as a new version; every rank of the group calls it and gets the same `Version`.

    Args:
        state_dict: modules, optimizers and other `Stateful` objects, DTensor, ShardedTensor,
            tensors on any device, nested dicts and lists, plain values.
        repo: a `Repository`, or what `open` takes (a new one is made where there is none).
        branch: moved to this version when it commits; its tip then is the version's parent.
        step: of the training run.
        tags: names for this version, which stay with it until they are moved on purpose.
        message, metrics, labels, author: kept with the version, for `log` and for SQL; a metric is
            a number (a tensor of one element too), a label any value, kept as its text.
        metrics_from: "all" refuses metrics and labels that differ between ranks; with "rank0" those
            of rank 0 of the group count, and the others' are not read.
        parent: where a branch that does not exist begins (a ref).
        expect_tip: the ref that the branch must still name; else ConflictError.
        retention: rules by which older versions of the branch then expire, as by
            `Repository.expire`; if that fails, it is only logged, because the save has succeeded.
        planner: torch's save planner or ours; None is `DefaultSavePlanner()`.
        process_group: the ranks that take part; None is all.
        no_dist: save in this process alone, even if there is a process group.
        allow_pickle: let values that JSON cannot carry be stored as pickles.
        checkpoint_id: another name for `repo`, for code written for torch.
        storage_writer: any storage of torch's instead of `repo`; the save is then torch's own, with
            our planner, and returns torch's Metadata. In the place of `repo` it is accepted too, as
            torch does, with a warning.
        use_collectives: False lets each rank save what it holds without the other ranks: as a
            version of its own on the branch `main/rank-3`, with tags such as `best/rank-3`.
            `load` finds it by the plain name.

    Raises:
        InvalidInputError: a name, an item or a plan is invalid, or the ranks disagree.
        UnsafeDataError: an item is neither tensor nor plain value, and pickle is not allowed.
        AlreadyExistsError: a tag is taken.
        NotFoundError: `parent` or `expect_tip` names nothing.
        ConflictError: the branch moved meanwhile.
        RankFailure: some ranks failed, with each one's error; the repository shows nothing.
    """
    check_options("save", options)
    repo, storage_writer = taken_writer("save", repo, storage_writer)
    if storage_writer is not None:
        check_planner(planner, SavePlanner)
        given = make_request(**options).non_defaults
        check_unused("storage_writer", *given, repo=repo is not None, allow_pickle=allow_pickle)
        described: Metadata = torch_save(
            state_dict,
            checkpoint_id=checkpoint_id,
            storage_writer=storage_writer,
            planner=planner_of(planner, is_whole=use_collectives),
            process_group=process_group,
            no_dist=no_dist,
            **newer_arguments(torch_save, use_collectives=use_collectives),
        )
        return described
    ranks = find_collectives(process_group, no_dist=no_dist, use_collectives=use_collectives)

    def request() -> SaveRequest:
        raise_unseen()
        check_planner(planner, SavePlanner)
        made = make_request(leads=ranks.leads, **options)
        return made if use_collectives else own_request(made, ranks.rank)

    with ExitStack() as stack:
        return save_version(
            state_dict,
            lambda: target_of(where_given("save", repo, checkpoint_id), stack),
            request,
            ranks=ranks,
            planner=planner,
            allow_pickle=allow_pickle,
            is_whole=use_collectives,
        )


@overload
def load(
    state_dict: dict[str, Any],
    *,
    storage_reader: StorageReader,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    rename: Rename | None = None,
    strict: bool = True,
    on_dtype: OnDtype = "error",
    checkpoint_id: str | os.PathLike[str] | None = None,
) -> None: ...


@overload
def load(
    state_dict: dict[str, Any],
    repo: RepositoryLike | None = None,
    ref: RefLike | None = None,
    *,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    rename: Rename | None = None,
    strict: bool = True,
    on_dtype: OnDtype = "error",
    init_missing: Callable[[str, torch.Tensor], object] | None = None,
    dry_run: bool = False,
    verify: bool = True,
    allow_pickle: bool = False,
    checkpoint_id: str | os.PathLike[str] | None = None,
) -> LoadReport: ...


def load(
    state_dict: dict[str, Any],
    repo: RepositoryLike | None = None,
    ref: RefLike | None = None,
    *,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    rename: Rename | None = None,
    strict: bool = True,
    on_dtype: OnDtype = "error",
    init_missing: Callable[[str, torch.Tensor], object] | None = None,
    dry_run: bool = False,
    verify: bool = True,
    allow_pickle: bool = False,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
) -> LoadReport | None:
    """Fill a state in place from a version; every rank of the group calls it with its own part.

    The number of ranks, the mesh and the placements may differ from those of the save. Optimizers
    and other `Stateful` objects, anywhere in the state's lists and dicts, get all that was saved
    under them; a module gets what its own state names. Other entries of the version are not loaded;
    the report names them. If `ref` names only versions that ranks saved alone, with
    `use_collectives=False`, each rank loads its own version, without waiting for the others.

    Args:
        state_dict: as for `save`; its tensors are filled, its values replaced.
        repo: a `Repository`, or what `open` takes.
        ref: the version: `12`, `"v12"`, a tag, a branch, `"main~3"`, or a `Version`, such as
            `repo.best("loss")`; None is the tip of `main`.
        planner: torch's load planner or ours; None is `DefaultLoadPlanner()`.
        process_group: the ranks that take part; None is all.
        no_dist: load in this process alone, even if there is a process group.
        include, exclude: what to load by the FQNs of the state; each text is the name of an item
            or of all below it ("model"), or a glob ("*.bias"). The rest is left as it is.
        rename: the FQN in the version of an FQN in the state, as a mapping or a function.
        strict: False leaves what the version lacks as it is, and reports it as missing;
            `differences` then lists what a module, optimizer or other `Stateful` object did not
            take over. The version may always lack an optimizer's state of a parameter, which was
            frozen at the save or added since; the optimizer then keeps the state that it has.
        on_dtype: "cast" converts values whose dtype differs, "error" refuses them.
        init_missing: called with the FQN and the tensor of each that the version lacks, after all
            others are filled.
        dry_run: return the report without touching the state; its `differences` say what would
            make the load fail.
        verify: check every byte read against its digest before it reaches a tensor.
        allow_pickle: let values that are pickles run their code.
        checkpoint_id: another name for `repo`, for code written for torch.
        storage_reader: any storage of torch's instead of `repo`; the load is then torch's own, with
            our planner and its options, and returns nothing. In the place of `repo` it is accepted
            too, as torch does, with a warning.

    Raises:
        MismatchError: everything that is missing or differs, on any rank; no tensor was touched.
            Also raised after the load (the message says so), if a module, optimizer or other
            `Stateful` object did not keep the stored bits, dtype, shape or Python type, or is still
            on the meta device.
        InvalidInputError: an argument is invalid, or a place in the state cannot be filled.
        NotFoundError: no such version or repository; or a text of `include`, `exclude` or `rename`
            that names nothing, neither in the version nor in the state of any rank.
        CorruptionError: stored bytes are damaged; tensors before the damage are filled already.
        UnsafeDataError: a value is a pickle, and pickle is not allowed; no tensor was touched.
        RankFailure: some ranks failed, with each one's error.
    """

    own: str | None = None  # the version that this rank saved for itself

    def make_planner() -> LoadPlanner:
        if init_missing is not None and not callable(init_missing):
            raise InvalidInputError(
                f"init_missing={init_missing!r} is no function; pass one of an FQN and its tensor."
            )
        options = LoadOptions(
            include=include,
            exclude=exclude,
            rename=rename,
            strict=strict if init_missing is None else False,
            on_dtype=on_dtype,
        )
        check_planner(planner, LoadPlanner)
        check_ref(ref)
        if planner is None:
            ours = DefaultLoadPlanner(options=options)
            ours.checks_names = own is None
            return ours
        if options != LoadOptions():
            raise InvalidInputError(
                "include, exclude, rename, strict, on_dtype and init_missing are for our own "
                "planner; leave out planner=, or give that one the options."
            )
        return planner

    repo, storage_reader = taken_reader("load", repo, storage_reader)
    if storage_reader is not None:
        check_unused(
            "storage_reader",
            repo=repo is not None,
            ref=ref is not None,
            init_missing=init_missing is not None,
            dry_run=dry_run,
            verify=not verify,
            allow_pickle=allow_pickle,
        )
        torch_load(
            state_dict,
            checkpoint_id=checkpoint_id,
            storage_reader=storage_reader,
            planner=make_planner(),
            process_group=process_group,
            no_dist=no_dist,
        )
        return None
    with ExitStack() as stack:

        @cache
        def open_repository() -> Repository:
            where = where_given("load", repo, checkpoint_id)
            return stack.enter_context(opened(where, create=False))

        def open_source() -> LoadSource:
            repository = open_repository()
            return LoadSource(repository.catalog, repository.storage, repository.location)

        own = _find_own(open_repository, ref, process_group, no_dist=no_dist)
        ranks = find_collectives(process_group, no_dist=no_dist, use_collectives=own is None)
        return load_version(
            state_dict,
            open_source,
            own or ref,
            ranks=ranks,
            make_planner=make_planner,
            verify=verify,
            allow_pickle=allow_pickle,
            dry_run=dry_run,
            init_missing=init_missing,
        )


def _find_own(
    open_repository: Callable[[], Repository],
    ref: RefLike | None,
    group: dist.ProcessGroup | None,
    *,
    no_dist: bool,
) -> str | None:
    """Return this rank's own version, if `ref` names only versions that ranks saved alone.

    The result is its ref, or None. All ranks read the same catalog, so they come to the same answer
    without an exchange.

    Raises:
        NotFoundError: other ranks saved theirs, and this one has none.
    """
    try:
        asked = Ref(name=DEFAULT_BRANCH) if ref is None else parse_ref(ref)
        if asked.name is None:
            return None
        rank = alone_in(group, no_dist=no_dist).rank
        own, first = rank_name(asked.name, rank), rank_name(asked.name, 0)
        known = find_refs(open_repository().catalog, [asked.name, own, first])
    except DcpstoreError:  # the first exchange meets it too, and raises it on every rank
        return None
    if asked.name in known or not known:
        return None
    if own not in known:
        raise NotFoundError(
            f"rank {rank} has no version {own!r}: {asked.name!r} was saved with "
            "use_collectives=False, and by fewer ranks. Load that of another rank by its name, "
            f"such as {first!r}, with no_dist=True."
        )
    return str(replace(asked, name=own, uid=None))


def target_of(where: RepositoryLike, stack: ExitStack) -> SaveTarget:
    """Return the parts of the repository to save to, open until `stack` closes."""
    repository = stack.enter_context(opened(where, create=True))
    return SaveTarget(
        repository.catalog, repository.storage, repository.memory, repository.location
    )
