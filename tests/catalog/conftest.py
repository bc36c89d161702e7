"""A catalog on each database, and saves without bytes: the catalog never looks into a pack."""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.write.saves import begin_save, commit_save
from dcpstore.geometry.boxes import Box
from dcpstore.geometry.grids import Grid
from dcpstore.records import (
    NewChunk,
    NewEntry,
    NewTensor,
    PackRecord,
    PlanRecord,
    ShardRecord,
    Version,
    VersionContent,
    VersionDraft,
)

Save = Callable[..., Version]


@pytest.fixture
def catalog(database_url: str) -> Iterator[Catalog]:
    with Catalog.make(database_url, data_url="file:///data") as opened:
        yield opened


@pytest.fixture
def save(catalog: Catalog) -> Save:
    """Begin and commit a version of one tensor an FQN, each of four chunks named by its text."""
    uids = itertools.count(1)

    def save(tensors: Mapping[str, str] | None = None, **draft: Any) -> Version:
        uid = f"save-{next(uids)}"
        begin_save(catalog, make_draft(uid, **draft))
        return commit_save(catalog, uid, make_content(uid, tensors or {"w": uid})).value

    return save


def make_draft(uid: str, *, branch: str = "main", **fields: Any) -> VersionDraft:
    return VersionDraft(uid=uid, branch=branch, **fields)


def make_tensor(text: str, pack: str, *, codec: str = "none") -> NewTensor:
    """Return a tensor of two parts, of three chunks and one; its content is `text`."""
    parts = (Grid((0,), (5,), (2,)), Grid((5,), (2,), (2,)))
    chunks = [
        NewChunk(
            part, ordinal, chunk_digest(text, part, ordinal), pack, 10 * (3 * part + ordinal), 10
        )
        for part, grid in enumerate(parts)
        for ordinal in range(math.prod(grid.counts))
    ]
    return NewTensor(digest_of(text), "float32", (7,), codec, 28, parts, chunks)


def digest_of(text: str) -> str:
    """Return the digest of the tensor whose content is `text`."""
    return hashlib.sha256(text.encode()).hexdigest()


def chunk_digest(text: str, part: int, ordinal: int) -> bytes:
    return hashlib.sha256(f"{text} {part} {ordinal}".encode()).digest()


def make_content(
    uid: str,
    texts: Mapping[str, str],
    *,
    codec: str = "none",
    created_at: datetime | None = None,
    **replaced: Any,
) -> VersionContent:
    """Return a content in which FQN -> text is a tensor, plus the value `lr`."""
    packs = {text: f"packs/{uid}/0-{i}.pack" for i, text in enumerate(sorted(set(texts.values())))}
    fields: dict[str, Any] = {
        "entries": [
            *(
                NewEntry(fqn, tuple(fqn.split(".")), "tensor", digest_of(text))
                for fqn, text in texts.items()
            ),
            NewEntry("optim.lr", ("optim", 0, "lr"), "value", value="0.001"),
        ],
        "tensors": [make_tensor(text, packs[text], codec=codec) for text in packs],
        "packs": [PackRecord(key, 40) for key in packs.values()],
        "plan": PlanRecord(
            "plan",
            2,
            [
                ShardRecord("w", 0, Box((0,), (5,))),
                ShardRecord("w", 1, Box((5,), (1,))),
                ShardRecord("w", 1, Box((6,), (1,))),
            ],
        ),
        "nbytes": 28 * len(texts),
        "nbytes_written": 40 * len(packs),
        "nbytes_reused": 0,
        "seconds": {"write": 0.25},
        "created_at": created_at or datetime.now(UTC),
    }
    return VersionContent(**(fields | replaced))
