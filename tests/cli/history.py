"""A repository's history without bytes, the same at every run: what the command line shows."""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

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

START = datetime(2026, 3, 1, 9, 30, tzinfo=UTC)
SHAPE, CHUNK = (512, 1024), (256, 1024)
NBYTES = 512 * 1024 * 4


def save_version(
    catalog: Catalog,
    index: int,
    *,
    branch: str = "main",
    tags: tuple[str, ...] = (),
    message: str = "",
    step: int | None = None,
    metrics: Mapping[str, float] | None = None,
    labels: Mapping[str, str] | None = None,
) -> Version:
    """Commit a version of two tensors and two values; `index` decides its uid, time and bytes."""
    uid = hashlib.md5(f"version {index}".encode()).hexdigest()
    begin_save(
        catalog,
        VersionDraft(
            uid=uid,
            branch=branch,
            step=step,
            message=message,
            tags=tags,
            metrics=metrics or {},
            labels=labels or {},
            author="ada",
            host="node1",
            ranks=2,
        ),
    )
    return commit_save(catalog, uid, _content(uid, index, step)).value


def save_example(catalog: Catalog) -> None:
    """Commit the three versions that the documentation shows."""
    save_version(
        catalog,
        1,
        step=500,
        message="after warm-up",
        metrics={"val_loss": 2.31},
        labels={"lr": "3e-4"},
    )
    save_version(
        catalog,
        2,
        step=1000,
        tags=("best",),
        metrics={"val_loss": 1.87, "train_loss": 1.72},
        labels={"lr": "3e-4"},
    )
    save_version(catalog, 3, step=1500, message="loss rises again", metrics={"val_loss": 1.94})


def _content(uid: str, index: int, step: int | None) -> VersionContent:
    pack = f"packs/{uid}/0-0.pack"
    new, kept = _tensor(f"weights {index}", pack, 0), _tensor("embedding", pack, NBYTES)
    return VersionContent(
        entries=[
            NewEntry("model.embed.weight", ("model", "embed.weight"), "tensor", kept.digest),
            NewEntry("model.head.weight", ("model", "head.weight"), "tensor", new.digest),
            NewEntry("optim.lr", ("optim", "lr"), "value", value="0.0003"),
            NewEntry("step", ("step",), "value", value="null" if step is None else str(step)),
        ],
        tensors=[new, kept],
        packs=[PackRecord(pack, 2 * NBYTES)],
        plan=PlanRecord("plan", 2, [ShardRecord("model.head.weight", 0, Box((0, 0), SHAPE))]),
        nbytes=2 * NBYTES,
        nbytes_written=NBYTES if index > 1 else 2 * NBYTES,
        nbytes_reused=NBYTES if index > 1 else 0,
        seconds={"plan": 0.02, "write": 0.41},
        created_at=START + timedelta(minutes=17 * index),
    )


def _tensor(text: str, pack: str, offset: int) -> NewTensor:
    half = NBYTES // 2
    chunks = [
        NewChunk(
            0, i, hashlib.sha256(f"{text} {i}".encode()).digest(), pack, offset + i * half, half
        )
        for i in range(2)
    ]
    digest = hashlib.sha256(text.encode()).hexdigest()
    return NewTensor(
        digest, "float32", SHAPE, "none", NBYTES, (Grid((0, 0), SHAPE, CHUNK),), chunks
    )
