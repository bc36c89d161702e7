"""From a request to a draft, and from finished state to a version that all can see.

Invariant: the manifest is durable before the one transaction that makes the version visible
(design, invariants 2 and 3).
"""

from __future__ import annotations

import operator
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Literal, SupportsFloat, get_args

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.maintenance.journal_files import write_journal
from dcpstore.catalog.maintenance.retention import Retention, retain
from dcpstore.catalog.read.entries import load_entries
from dcpstore.catalog.read.ref_lookup import list_refs, resolve
from dcpstore.catalog.validation import as_labels, as_metrics, check_draft
from dcpstore.catalog.write.saves import abort_save, commit_save
from dcpstore.core.ids import new_uid
from dcpstore.core.ref_syntax import rank_name
from dcpstore.core.user import this_user
from dcpstore.encoding.values import encode_value
from dcpstore.errors import ConflictError, DcpstoreError, InvalidInputError, NotFoundError
from dcpstore.records import (
    EntryRecord,
    NewTensor,
    ObjectPath,
    PackRecord,
    Version,
    VersionContent,
    VersionDraft,
)
from dcpstore.saving.plan_exchange import PlanMemory
from dcpstore.saving.save_state import SaveState
from dcpstore.storage.interface import Storage
from dcpstore.zarr.documents import write_manifest

__all__ = [
    "MetricsFrom",
    "SaveRequest",
    "SaveTarget",
    "apply_retention",
    "draft_version",
    "entries_before",
    "give_up",
    "kept_planner_data",
    "make_request",
    "own_request",
    "publish",
]

MetricsFrom = Literal["all", "rank0"]


@dataclass(frozen=True, slots=True)
class SaveTarget:
    """The parts of a repository that a save writes to, and what this process remembers of it.

    `location` is what torch's planners are given as `checkpoint_id`.
    """

    catalog: Catalog
    storage: Storage
    memory: PlanMemory
    location: str | Path


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """What the caller says about the version to be; `parent` and `expect_tip` are refs.

    `retention` says which versions of the branch stay once this one is there, and `metrics_from`
    whether all ranks must give the same metrics and labels, or only those of rank 0 count.
    """

    branch: str = "main"
    step: int | None = None
    message: str = ""
    tags: tuple[str, ...] = ()
    metrics_from: MetricsFrom = "all"
    metrics: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    author: str = ""
    parent: str | int | None = None
    expect_tip: str | int | None = None
    retention: Retention | None = None

    @property
    def named(self) -> list[str]:
        """The names of the arguments in which this differs from a request that asks for nothing."""
        plain = SaveRequest()
        return [
            field.name
            for field in fields(self)
            if getattr(self, field.name) != getattr(plain, field.name)
        ]


def make_request(
    *,
    branch: str,
    step: int | None,
    message: str,
    tags: Iterable[str],
    metrics: Mapping[str, SupportsFloat] | None,
    labels: Mapping[str, object] | None,
    author: str,
    parent: str | int | None,
    expect_tip: str | int | None,
    retention: Retention | None = None,
    metrics_from: MetricsFrom = "all",
    leads: bool = True,
) -> SaveRequest:
    """Return the request that a caller's arguments mean: metrics as floats, labels as text.

    With `metrics_from="rank0"` those of a rank that does not lead are left out, unread.

    Raises:
        InvalidInputError: `tags` is not a list of texts, `metrics` or `labels` not a mapping, a
            metric not a number, `retention` not rules, or `metrics_from` neither of its values; or
            a catalog cannot keep a name, step or text.
        AlreadyExistsError: the branch is one of the tags.
    """
    if isinstance(tags, str):
        raise InvalidInputError(f"tags={tags!r} is one text; pass a list: [{tags!r}].")
    if not isinstance(tags, Iterable):
        raise InvalidInputError(f"tags={tags!r} is no list; pass one such as ['best'], or [].")
    if retention is not None and not isinstance(retention, Retention):
        raise InvalidInputError(
            f"retention={retention!r} is no set of rules; pass one, such as "
            "dcpstore.Retention(keep_last=5)."
        )
    if metrics_from not in get_args(MetricsFrom):
        raise InvalidInputError(
            f"metrics_from={metrics_from!r}; write 'all', and every rank must give the same "
            "metrics and labels, or 'rank0', and only those of rank 0 count."
        )
    if metrics_from == "rank0" and not leads:
        metrics = labels = None
    request = SaveRequest(
        branch=branch,
        step=_as_whole(step),
        message=message,
        tags=tuple(tags),
        metrics_from=metrics_from,
        metrics=as_metrics(metrics),
        labels=as_labels(labels),
        author=author,
        parent=parent,
        expect_tip=expect_tip,
        retention=retention,
    )
    check_draft(_draft(request, author=author))
    return request


def own_request(request: SaveRequest, rank: int) -> SaveRequest:
    """Return the request for what one rank saves by itself: under names of its own.

    Raises:
        InvalidInputError: the metrics are to be those of another rank.
    """
    if request.metrics_from != "all":
        raise InvalidInputError(
            f"metrics_from={request.metrics_from!r} needs what another rank gives, and with "
            "use_collectives=False no rank hears another; leave it out, each version then has the "
            "metrics and labels of its rank."
        )
    tags = tuple(rank_name(tag, rank) for tag in request.tags)
    return replace(request, branch=rank_name(request.branch, rank), tags=tags)


def _as_whole(step: int | None) -> int | None:
    """Return a step of any library's integers as Python's; what is none, `check_draft` refuses."""
    try:
        return step if step is None or isinstance(step, bool) else operator.index(step)
    except TypeError:
        return step


def draft_version(
    catalog: Catalog, request: SaveRequest, *, ranks: int, uid: str | None = None
) -> VersionDraft:
    """Return the draft of a version; its refs resolved, its author and host filled in.

    Raises:
        NotFoundError: `parent` or `expect_tip` names nothing.
    """
    return replace(
        _draft(request, author=request.author or this_user()),
        uid=uid or new_uid(),
        host=socket.gethostname(),
        ranks=ranks,
        parent=_number(catalog, request.parent),
        expect_tip=_number(catalog, request.expect_tip),
    )


def _draft(request: SaveRequest, *, author: str) -> VersionDraft:
    """Return what a request says of a draft before a catalog is asked."""
    return VersionDraft(
        uid="",
        branch=request.branch,
        step=request.step,
        message=request.message,
        tags=request.tags,
        metrics=request.metrics,
        labels=request.labels,
        author=author,
    )


def entries_before(
    target: SaveTarget, draft: VersionDraft
) -> tuple[int, Mapping[str, EntryRecord]]:
    """Return the parent as it is now: its number, and its entries by FQN, whose grids are kept.

    The entries of a version that this process saved lately are remembered, without tensors' ids.
    """
    try:
        return _entries_of_parent(target, draft)
    except NotFoundError:  # forgotten or expired meanwhile: the commit finds out, if it matters
        return 0, {}


def _entries_of_parent(
    target: SaveTarget, draft: VersionDraft
) -> tuple[int, Mapping[str, EntryRecord]]:
    ref: str | int | None = draft.branch
    if not any(known.name == ref for known in list_refs(target.catalog, "branch")):
        ref = draft.parent
        if ref is None:
            return 0, {}
    number = resolve(target.catalog, ref).number
    held = target.memory.entries.get(number)
    if held is None:
        held = {entry.fqn: entry for entry in load_entries(target.catalog, number)}
    return number, held


def kept_planner_data(
    given: object, recorded: Mapping[str, ObjectPath] = MappingProxyType({})
) -> tuple[Mapping[str, ObjectPath], str | None]:
    """Return the object paths that a planner gives, or else what it gives as typed JSON.

    They are the `recorded` ones, which say more, where those are the same paths.

    Raises:
        UnsafeDataError: it gives what only a pickle could keep.
    """
    if given is None:
        return {}, None
    if given == recorded:
        return recorded, None
    if isinstance(given, Mapping) and all(map(_is_path, given.values())):
        return given, None
    encoded = encode_value(given, allow_pickle=False)
    return {}, encoded.text if encoded.data is None else encoded.data.decode()


def _is_path(given: object) -> bool:
    return isinstance(given, tuple) and all(type(key) in (str, int) for key in given)


def publish(
    target: SaveTarget,
    draft: VersionDraft,
    state: SaveState,
    *,
    packs: Sequence[PackRecord],
    seconds: dict[str, float],
    planner_data: str | None,
) -> Version:
    """Write the manifest of a begun version and commit it; its packs are durable.

    Where chunks that the save reuses have moved meanwhile (gc repacks), both are done once more.

    Raises:
        ConflictError: the branch moved, or what the save reuses is gone; save again.
        AlreadyExistsError: a tag was taken meanwhile.
    """
    try:
        version = _published(
            target, draft, state, packs=packs, seconds=seconds, planner_data=planner_data
        )
    except ConflictError:
        version = _published(
            target, draft, state, packs=packs, seconds=seconds, planner_data=planner_data
        )
    write_journal(target.catalog, target.storage)
    return version


def apply_retention(target: SaveTarget, rules: Retention | None, version: Version) -> None:
    """Expire versions of the branch of a new one by the rules that were asked for with it."""
    if rules is not None:
        retain(target.catalog, rules, branch=version.branch, author=version.author)
        write_journal(target.catalog, target.storage)


def give_up(catalog: Catalog, uid: str, error: BaseException) -> None:
    """Record why a begun save ended without a version; what fails in that is noted on `error`."""
    try:
        abort_save(catalog, uid, f"{type(error).__name__}: {error}")
    except DcpstoreError as second:
        error.add_note(f"the catalog could not record that the save failed: {second}")


def _published(
    target: SaveTarget,
    draft: VersionDraft,
    state: SaveState,
    *,
    packs: Sequence[PackRecord],
    seconds: dict[str, float],
    planner_data: str | None,
) -> Version:
    began = time.perf_counter()
    tensors = state.tensors(target.catalog)
    _check_whole(tensors)
    content = VersionContent(
        entries=state.entries(),
        tensors=tensors,
        packs=packs,
        plan=state.plan,
        nbytes=state.nbytes,
        nbytes_written=sum(pack.nbytes for pack in packs),
        nbytes_reused=state.nbytes_reused,
        seconds=seconds,
        created_at=datetime.now(UTC),
        aliases=state.aliases,
        planner_data=planner_data,
    )
    entries = content.records()
    write_manifest(target.storage, draft, content, entries)
    seconds["manifest"] = time.perf_counter() - began
    version = commit_save(target.catalog, draft.uid, content)
    target.memory.entries.put(version.number, {entry.fqn: entry for entry in entries})
    return version


def _check_whole(tensors: Sequence[NewTensor]) -> None:
    for tensor in tensors:
        if len(tensor.chunks) != sum(grid.size for grid in tensor.parts):
            raise ConflictError(
                f"the tensor {tensor.digest}, which the save found in the repository, was "
                "collected as garbage meanwhile. Save again."
            )


def _number(catalog: Catalog, ref: str | int | None) -> int | None:
    return None if ref is None else resolve(catalog, ref).number
