"""The repository that the guide to SQL asks about, without bytes and the same at every run."""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.read.dedup import find_tensors
from dcpstore.catalog.write.annotations import add_metrics
from dcpstore.catalog.write.refs import make_ref, roll_back
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
    VersionContent,
    VersionDraft,
)

START = datetime(2026, 3, 1, 9, 30, tzinfo=UTC)
SHAPES = {"model.embed.weight": (512, 64), "model.head.weight": (64, 512), "model.norm": (64,)}


def tell_story(catalog: Catalog) -> None:
    """Train five versions, the embedding frozen from the second on, and try a rate on a branch."""
    frozen, lr = "embed 2", "0.0003"
    _save(catalog, 1, frozen="embed 1", lr=lr, val_loss=2.31, message="after warm-up")
    _save(catalog, 2, frozen=frozen, lr=lr, val_loss=1.87, tags=("best",))
    _save(catalog, 3, frozen=frozen, lr=lr, val_loss=1.94, message="loss rises again")
    roll_back(catalog, "main", "best", force=False, expect_tip=None, author="ada")
    make_ref(catalog, "try-lr", "branch", version=2, author="ada")
    _save(catalog, 4, frozen=frozen, lr="0.0001", val_loss=1.79, branch="try-lr")
    _save(catalog, 5, frozen=frozen, lr=lr, norm="norm 4", val_loss=1.82, author="grace")
    add_metrics(catalog, "try-lr", {"accuracy": 0.61}, author="grace")
    make_ref(catalog, "release", "tag", version=4, author="grace")


def _save(
    catalog: Catalog,
    index: int,
    *,
    frozen: str,
    lr: str,
    val_loss: float,
    norm: str = "",
    branch: str = "main",
    tags: tuple[str, ...] = (),
    message: str = "",
    author: str = "ada",
) -> None:
    uid = hashlib.md5(f"story {index}".encode()).hexdigest()
    step = {4: 1500}.get(index, 500 * index)
    begin_save(
        catalog,
        VersionDraft(
            uid=uid,
            branch=branch,
            step=step,
            message=message,
            tags=tags,
            metrics={"val_loss": val_loss},
            labels={"lr": lr, "data": "topics"},
            author=author,
            host="node1",
            ranks=2,
        ),
    )
    texts = {
        "model.embed.weight": frozen,
        "model.head.weight": f"head {index}",
        "model.norm": norm or f"norm {index}",
    }
    commit_save(
        catalog, uid, _content(catalog, uid, texts, lr, START + timedelta(minutes=17 * index))
    )


def _content(
    catalog: Catalog, uid: str, texts: Mapping[str, str], lr: str, at: datetime
) -> VersionContent:
    digests = {fqn: hashlib.sha256(text.encode()).hexdigest() for fqn, text in texts.items()}
    known = find_tensors(catalog, list(digests.values()))
    pack, offset, tensors = f"packs/{uid}/0-0.pack", 0, []
    for fqn, digest in digests.items():
        shape, nbytes = SHAPES[fqn], _nbytes(fqn)
        chunks = []
        if digest not in known:
            chunks = [NewChunk(0, 0, bytes.fromhex(digest), pack, offset, nbytes * 7 // 8)]
            offset += nbytes * 7 // 8
        grid = Grid((0,) * len(shape), shape, shape)
        tensors.append(NewTensor(digest, "float32", shape, "zstd", nbytes, (grid,), chunks))
    return VersionContent(
        entries=[
            *(NewEntry(f, tuple(f.split(".")), "tensor", digest) for f, digest in digests.items()),
            NewEntry("optim.lr", ("optim", "lr"), "value", value=lr),
        ],
        tensors=tensors,
        packs=[PackRecord(pack, offset)],
        plan=PlanRecord("plan", 2, [ShardRecord("model.norm", 0, Box((0,), (64,)))]),
        nbytes=sum(map(_nbytes, texts)),
        nbytes_written=offset,
        nbytes_reused=sum(_nbytes(f) for f, digest in digests.items() if digest in known),
        seconds={"write": 0.41},
        created_at=at,
    )


def _nbytes(fqn: str) -> int:
    nbytes = 4
    for n in SHAPES[fqn]:
        nbytes *= n
    return nbytes
