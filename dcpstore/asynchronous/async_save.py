"""`async_save`: the call, on every rank, that saves while training goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from typing import Any, Unpack, overload

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.checkpoint.state_dict_saver import async_save as torch_async_save
from torch.distributed.checkpoint.storage import StorageWriter

from dcpstore.api import (
    RepositoryLike,
    check_planner,
    check_unused,
    taken_writer,
    target_of,
    where_given,
)
from dcpstore.asynchronous.other_process import check_process, save_in_process
from dcpstore.collectives import Collectives
from dcpstore.compat.torch_private import AsyncSaveResponse, newer_arguments
from dcpstore.errors import InvalidInputError
from dcpstore.planning.save_planner import planner_of
from dcpstore.records import Version
from dcpstore.repository import Repository
from dcpstore.saving.request import (
    SaveOptions,
    check_options,
    make_request,
    own_request,
    shows_options,
)
from dcpstore.saving.save_pipeline import save_version
from dcpstore.saving.staging import Background, IfBusy, PendingSave, find_saver, raise_unseen

__all__ = ["async_save"]


@overload
def async_save(
    state_dict: dict[str, Any],
    *,
    storage_writer: StorageWriter,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    checkpoint_id: str | os.PathLike[str] | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    use_collectives: bool = True,
) -> Future[Metadata] | AsyncSaveResponse: ...


@overload
def async_save(
    state_dict: dict[str, Any],
    repo: RepositoryLike | None = None,
    *,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    allow_pickle: bool = False,
    use_collectives: bool = True,
    checkpoint_id: str | os.PathLike[str] | None = None,
    if_busy: IfBusy = "wait",
    staging_limit: int | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    **options: Unpack[SaveOptions],
) -> PendingSave: ...


@shows_options(SaveOptions)
def async_save(
    state_dict: dict[str, Any],
    repo: RepositoryLike | None = None,
    *,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    allow_pickle: bool = False,
    checkpoint_id: str | os.PathLike[str] | None = None,
    if_busy: IfBusy = "wait",
    staging_limit: int | None = None,
    storage_writer: StorageWriter | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    use_collectives: bool = True,
    **options: Unpack[SaveOptions],
) -> PendingSave | Future[Metadata] | AsyncSaveResponse:
    """Save as `save` does, but return as soon as the state may be changed again.

    The state is copied into CPU memory, which later saves reuse (pinned if there is CUDA). A thread
    saves it from there, with a gloo group of its own that the first call makes. All ranks call it.
    A failure is raised by `result()`; if that is not called, by the next save or by
    `Repository.close`, and it is logged at exit. The catalog records it too.

    Args:
        state_dict, repo, checkpoint_id, planner, allow_pickle: as for `save`.
        process_group, no_dist, use_collectives: as for `save`.
        branch, step, tags, message, metrics, labels, metrics_from, author: as for `save`.
        parent, expect_tip, retention: as for `save`.
        if_busy: "wait" for a save that is still running, or "refuse": raise ConflictError.
        staging_limit: bytes that may be copied of a rank's state, counted as the storages of its
            tensors. A rank with more saves before it returns, without a copy.
        storage_writer: any storage of torch's instead of `repo`; the save is then torch's own
            `async_save`, with our planner, and returns what torch's does. It may also be given in
            the place of `repo`, with a warning.
        async_checkpointer_type: THREAD, or PROCESS to save in torch's background process, which a
            process group of all ranks starts at its first save. The state is sent to it by pickle,
            and changes of `planner` do not come back. PROCESS helps if Python code of the training
            holds the interpreter lock; THREAD copies less.
        async_stager: used for staging instead of ours. If its `stage()` returns a Future, the state
            may be changed only when `staged` is done. The caller closes it, after the last save.

    Returns:
        The pending save: `staged` is done, `result()` waits for the version.

    Raises:
        InvalidInputError: an argument or a tensor is invalid; nothing was begun.
        ConflictError: a save is still running and `if_busy` is "refuse".
        DcpstoreError: the save before failed, and that was not seen yet.
    """
    check_options("async_save", options)
    repo, storage_writer = taken_writer("async_save", repo, storage_writer)
    if storage_writer is not None:
        check_planner(planner, SavePlanner)
        check_unused(
            "storage_writer",
            *make_request(**options).non_defaults,
            repo=repo is not None,
            allow_pickle=allow_pickle,
            if_busy=if_busy != "wait",
            staging_limit=staging_limit is not None,
        )
        response: Future[Metadata] | AsyncSaveResponse = torch_async_save(
            state_dict,
            checkpoint_id=checkpoint_id,
            storage_writer=storage_writer,
            planner=planner_of(planner, is_whole=use_collectives),
            process_group=process_group,
            async_checkpointer_type=async_checkpointer_type,
            **newer_arguments(
                torch_async_save,
                async_stager=async_stager,
                no_dist=no_dist,
                use_collectives=use_collectives,
            ),
        )
        return response

    def prepare(ranks: Collectives) -> Background:
        where = where_given("async_save", repo, checkpoint_id)
        check_planner(planner, SavePlanner)
        # Read now, not in the thread: a metric may be a tensor that training changes.
        request = make_request(leads=ranks.leads, **options)
        if not isinstance(async_checkpointer_type, AsyncCheckpointerType):
            raise InvalidInputError(
                f"async_checkpointer_type={async_checkpointer_type!r}; pass one of torch's "
                "AsyncCheckpointerType: THREAD or PROCESS."
            )
        if async_checkpointer_type is AsyncCheckpointerType.PROCESS:
            if not use_collectives:
                raise InvalidInputError(
                    "async_checkpointer_type=PROCESS with use_collectives=False: torch's "
                    "background processes save together; use AsyncCheckpointerType.THREAD."
                )
            check_process(process_group, planner, no_dist=no_dist)
            return partial(
                save_in_process,
                where=where,
                request=request,
                planner=planner,
                allow_pickle=allow_pickle,
            )
        if not use_collectives:
            request = own_request(request, ranks.rank)

        def save_staged(
            staged: Mapping[str, Any], ranks: Collectives, buffers: frozenset[str]
        ) -> Version:
            with ExitStack() as stack:
                return save_version(
                    staged,
                    lambda: target_of(where, stack),
                    lambda: request,
                    ranks=ranks,
                    planner=planner,
                    allow_pickle=allow_pickle,
                    buffers=buffers,
                    is_whole=use_collectives,
                )

        return save_staged

    saver = find_saver(process_group, no_dist=no_dist, use_collectives=use_collectives)
    pending = saver.begin(
        state_dict, prepare, if_busy=if_busy, staging_limit=staging_limit, stager=async_stager
    )
    if isinstance(repo, Repository):  # its close() then waits for the save, and raises its failure
        repo.finish_before_close(raise_unseen)
    return pending
