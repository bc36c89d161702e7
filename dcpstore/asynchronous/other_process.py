"""Saves that run in the background process of `torch.distributed.checkpoint.async_save`.

Torch starts one such process per rank, at the first save, with a process group of its own, and
sends it the state by pickle. Invariant: what could end that process is refused before it is sent,
because the processes of the other ranks would wait for it forever.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.checkpoint.state_dict_saver import async_save as torch_async_save

from dcpstore.collectives import Collectives, RankGroup, has_process_group, in_step
from dcpstore.compat.torch_private import ShardedTensor, takes_argument
from dcpstore.dcp.writer import RepositoryWriter
from dcpstore.errors import DcpstoreError, InvalidInputError, RankFailure
from dcpstore.planning import DefaultSavePlanner
from dcpstore.records import Version
from dcpstore.repository import Repository, opened
from dcpstore.saving.coordinator import OpenRequest, check_requests
from dcpstore.saving.replicas import compare_state
from dcpstore.saving.request import SaveRequest
from dcpstore.state.buffers import is_statistic
from dcpstore.state.stateful import check_keys
from dcpstore.state.walk import PLAIN, walk

__all__ = ["check_process", "save_in_process"]

_INSTEAD = "use AsyncCheckpointerType.THREAD"


def check_process(
    group: dist.ProcessGroup | None, planner: SavePlanner | None, *, no_dist: bool
) -> None:
    """Check that torch's background process can save for these ranks, by this planner.

    Raises:
        InvalidInputError: there is no process group, it is not that of all ranks, or the planner
            cannot be sent.
    """
    if no_dist or not has_process_group():
        raise InvalidInputError(
            "async_checkpointer_type=PROCESS needs a process group, which torch's background "
            f"processes join, and this save has none; {_INSTEAD}, or call init_process_group first."
        )
    if group is not None and group is not dist.group.WORLD:
        raise InvalidInputError(
            "async_checkpointer_type=PROCESS with a process_group: torch's background processes "
            f"have one group for the whole job; {_INSTEAD}, or leave process_group out."
        )
    _check_sendable("planner", planner)


def save_in_process(
    staged: Mapping[str, Any],
    ranks: Collectives,
    buffers: frozenset[str],
    *,
    where: Repository | str | os.PathLike[str],
    request: SaveRequest,
    planner: SavePlanner | None,
    allow_pickle: bool,
) -> Version:
    """Save a staged state in torch's background process; every rank of `ranks` calls it.

    Raises:
        InvalidInputError: the ranks disagree, or hold different contents of one item, or the state
            has an item that cannot be sent.
        DcpstoreError: as `save`.
    """
    assert isinstance(ranks, RankGroup)

    def begin() -> OpenRequest:
        _check_state(staged)
        with opened(where, create=True) as repo:
            return OpenRequest(repo.about.uid, request, check_keys(staged))

    in_step(ranks, "open", begin, check_requests)
    if ranks.size > 1:
        differing = compare_state(staged, ranks, buffers=buffers, allow_pickle=allow_pickle)
        # Torch does not tell its process which FQNs are buffers, so their values could be mixed
        # from several ranks. For statistics of a batch norm any mix is accepted.
        odd = [fqn for fqn in differing if not is_statistic(fqn)]
        if odd:
            raise InvalidInputError(
                f"the module buffer {odd[0]!r} ({len(odd)} in all) differs between ranks; "
                f"{_INSTEAD}, which saves those of the lowest rank, or make them the same first."
            )
    asked = {part.name: getattr(request, part.name) for part in fields(SaveRequest)}
    del asked["metrics_from"]  # only the coordinator's writer is used, so there is no choice
    stager: dict[str, Any] = {}
    if takes_argument(torch_async_save, "async_stager"):  # older releases copy the state once more
        stager["async_stager"] = _AsStaged()
    response: Any = torch_async_save(
        dict(staged),
        storage_writer=RepositoryWriter(where, **asked, allow_pickle=allow_pickle),
        planner=planner or DefaultSavePlanner(),
        process_group=ranks.group,
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        **stager,
    )
    try:
        described = response.result()
    except CheckpointException as error:
        raise _own_error(error, ranks.size) from error
    except (BrokenPipeError, EOFError) as error:  # torch 2.8 begins no other one after a failure
        raise DcpstoreError(
            "torch's background process has ended, perhaps because an earlier save failed; "
            f"{_INSTEAD}, or start the program again."
        ) from error
    with opened(where, create=False) as repo:
        return repo.show(described.storage_meta.save_id)


class _AsStaged(AsyncStager):
    """A stager for a state that is staged already: it returns the same state."""

    _synchronize_after_execute = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict

    def synchronize_staging(self) -> None:
        return

    def close(self) -> None:
        return


def _check_state(staged: Mapping[str, Any]) -> None:
    """Check that each item of a staged state can be sent, by its FQN."""
    for path, value in walk(staged, skips=PLAIN):
        fqn = ".".join(map(str, path))
        if isinstance(value, ShardedTensor):
            raise InvalidInputError(
                f"{fqn!r} is a ShardedTensor, which cannot be sent to another process; {_INSTEAD}, "
                "or save DTensors."
            )
        if not isinstance(value, torch.Tensor):
            _check_sendable(repr(fqn), value)


def _check_sendable(name: str, value: object) -> None:
    try:
        pickle.dumps(value)
    except Exception as error:  # pickle runs code of the object, which may raise anything
        raise InvalidInputError(
            f"{name}: a {type(value).__name__} cannot be sent to torch's background process "
            f"({type(error).__name__}: {error}); {_INSTEAD}."
        ) from error


def _own_error(error: CheckpointException, size: int) -> DcpstoreError:
    """Return the error that a save of ours would raise instead of torch's."""
    failures = {rank: failure for rank, (failure, _) in error.failures.items()}
    distinct = {(type(failure), str(failure)) for failure in failures.values()}
    first = next(iter(failures.values()), None)
    # If only the coordinator failed, it was in its work for all ranks, as when a ref has moved.
    is_shared = len(distinct) == 1 and (len(failures) == size or [*failures] == [0])
    if isinstance(first, DcpstoreError) and is_shared:
        return first
    return RankFailure("a save in torch's background process", failures)
