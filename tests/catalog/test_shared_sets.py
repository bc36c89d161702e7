"""Shared entry sets and runs: what a version adds, what two writers share, what gc deletes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, insert, select

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.maintenance import sweep as sweeping
from dcpstore.catalog.maintenance.condemn import Condemned, condemn
from dcpstore.catalog.maintenance.expire import forget_versions
from dcpstore.catalog.maintenance.fsck import find_faults, packed_chunks
from dcpstore.catalog.maintenance.preview import preview
from dcpstore.catalog.read.entries import load_chunks, load_entries, shared_chunks
from dcpstore.catalog.read.log_filter import list_log
from dcpstore.catalog.schema import tables
from dcpstore.catalog.write.contents import write_content
from dcpstore.catalog.write.saves import abort_save, begin_save, commit_save
from dcpstore.core.digests import RUN
from dcpstore.geometry.grids import Grid
from dcpstore.records import ChunkRange, NewChunk, NewEntry, NewTensor, PackRecord, TensorRecord

from .conftest import Save, chunk_digest, digest_of, make_content, make_draft

LAYERS = {f"layer.{i:03}": f"{i}" for i in range(300)}
GROWING = ("fqn", "layout", "tensor", "run", "chunk", "node", "child", "entry")


def count(catalog: Catalog) -> dict[str, int]:
    """Return how many rows the tables have that grow with what changes."""
    with catalog.database.write() as connection:
        return {
            name: connection.scalar(select(func.count()).select_from(tables.tables.tables[name]))
            or 0
            for name in (*GROWING, "loose", "unjudged")
        }


def added(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in GROWING if after[name] != before[name]}


def collect(catalog: Catalog, *, dry_run: bool = False) -> Condemned:
    now, day = datetime.now(UTC) + timedelta(seconds=1), timedelta(days=1)
    if dry_run:
        return preview(catalog, now=now, grace=day, lease=day, live_share=0.5)
    return condemn(catalog, now=now, grace=day, lease=day, live_share=0.5, author="")


def forget(catalog: Catalog, *numbers: int) -> None:
    forget_versions(catalog, numbers, force=True, dry_run=False, author="")


def test_a_version_adds_what_changed(catalog: Catalog, save: Save) -> None:
    save(LAYERS)
    first = count(catalog)
    save(LAYERS)
    assert added(first, count(catalog)) == {}
    save({**LAYERS, "layer.007": "new"})
    new = added(first, count(catalog))
    assert (new.pop("tensor"), new.pop("chunk")) == (1, 4)
    assert new.pop("node") == 3  # a set, a group and the root
    assert new.pop("entry") < 200
    assert new.pop("child") < 20
    assert new == {}
    save({**LAYERS, "layer.007": "new", "layer.0075": "more"})
    assert added(first, count(catalog))["fqn"] == 1


def test_what_is_the_same_again_is_found_again(catalog: Catalog, save: Save) -> None:
    save(LAYERS)
    save({**LAYERS, "layer.007": "new"})
    before = count(catalog)
    save(LAYERS)
    assert added(before, count(catalog)) == {}
    assert load_entries(catalog, 3) == load_entries(catalog, 1)


def big(text: str, chunks: int, pack: str, *, changed: int | None = None) -> NewTensor:
    """Return a tensor of two parts with many chunks, one of which may have another content."""
    parts = (Grid((0,), (2 * chunks - 10,), (2,)), Grid((2 * chunks - 10,), (10,), (2,)))
    places = [(part, i) for part, grid in enumerate(parts) for i in range(grid.size)]
    return NewTensor(
        digest_of(f"{text} {changed}"),
        "float32",
        (2 * chunks,),
        "none",
        8 * chunks,
        parts,
        [
            NewChunk(
                *place,
                chunk_digest(f"{text} {'!' * (number == changed)}", *place),
                pack,
                10 * number,
                10,
                number.to_bytes(16, "big"),
            )
            for number, place in enumerate(places)
        ],
    )


def save_big(catalog: Catalog, uid: str, tensor: NewTensor) -> TensorRecord:
    begin_save(catalog, make_draft(uid))
    content = make_content(
        uid,
        {},
        entries=[NewEntry("w", ("w",), "tensor", tensor.digest)],
        tensors=[tensor],
        packs=[PackRecord(f"packs/{uid}/0-0.pack", 10 * len(tensor.chunks))],
    )
    version = commit_save(catalog, uid, content).value
    (entry,) = load_entries(catalog, version.number)
    assert entry.tensor is not None
    return entry.tensor


@pytest.mark.parametrize("chunks", [RUN, RUN + 1, 3 * RUN, 3 * RUN + 5])
def test_all_chunks_of_a_large_tensor_are_found(catalog: Catalog, chunks: int) -> None:
    tensor = big("w", chunks, "packs/u/0-0.pack")
    stored = save_big(catalog, "u", tensor)
    assert (stored.digest, stored.parts) == (tensor.digest, tensor.parts)
    whole = [ChunkRange(stored.id, 0, 0, 10**6), ChunkRange(stored.id, 1, 0, 4)]
    assert [c[1:] for c in load_chunks(catalog, whole)] == list(map(tuple, tensor.chunks))
    some = load_chunks(catalog, [ChunkRange(stored.id, 0, 3, 9), ChunkRange(stored.id, 1, 2, 2)])
    assert [(c.part, c.ordinal) for c in some] == [*((0, i) for i in range(3, 10)), (1, 2)]
    packed = packed_chunks(catalog, "packs/u/0-0.pack")
    assert [(c.tensor, c.part, c.ordinal, c.digest) for c in packed] == [
        (stored.id, c.part, c.ordinal, c.digest) for c in tensor.chunks
    ]
    assert find_faults(catalog) == []


def test_a_changed_chunk_of_a_large_tensor_adds_one_run(catalog: Catalog) -> None:
    old = save_big(catalog, "u1", big("w", 40, "packs/u1/0-0.pack"))
    before = count(catalog)
    new = save_big(catalog, "u2", big("w", 40, "packs/u2/0-0.pack", changed=20))
    change = added(before, count(catalog))
    assert (change["chunk"], change["run"], change["tensor"]) == (RUN, 3, 2)
    shared = shared_chunks(catalog, [(old.id, new.id)])
    places = [(part, i) for part, grid in enumerate(new.parts) for i in range(grid.size)]
    assert {(c.part, c.ordinal) for c in shared} == {*places} - {places[20]}
    chunks = load_chunks(catalog, [ChunkRange(new.id, p, 0, 99) for p in (0, 1)])
    assert {c.pack for c in chunks} == {"packs/u1/0-0.pack", "packs/u2/0-0.pack"}
    rows = {(old.id, new.id): len(shared)}
    assert rows == {(old.id, new.id): 39}
    forget(catalog, 1)
    collect(catalog)
    assert load_chunks(catalog, [ChunkRange(new.id, p, 0, 99) for p in (0, 1)]) == chunks
    assert added(before, count(catalog)) == {}
    assert find_faults(catalog) == []


def test_a_large_tensor_whose_pack_is_damaged_is_saved_again(catalog: Catalog) -> None:
    old = save_big(catalog, "u1", big("w", 40, "packs/u1/0-0.pack"))
    before = count(catalog)
    with catalog.database.write() as connection:
        connection.execute(tables.pack.update().values(damage="a bit flipped"))
    new = save_big(catalog, "u2", big("w", 40, "packs/u2/0-0.pack")._replace(codec="zstd"))
    assert (old.id, old.codec, new.id, new.codec) == (new.id, "none", old.id, "zstd")
    chunks = load_chunks(catalog, [ChunkRange(new.id, p, 0, 99) for p in (0, 1)])
    assert {c.pack for c in chunks} == {"packs/u2/0-0.pack"}
    assert added(before, count(catalog)) == {"layout": 1}
    assert find_faults(catalog) == []


@pytest.mark.parametrize("nodes", [500, 2])
def test_gc_deletes_what_only_a_dropped_version_had(
    catalog: Catalog, save: Save, monkeypatch: pytest.MonkeyPatch, nodes: int
) -> None:
    monkeypatch.setattr(sweeping, "_SLICE", nodes)
    save(LAYERS)
    collect(catalog)
    before = count(catalog)
    for i in range(3):
        save({**LAYERS, f"layer.{100 * i:03}": "new", f"more.{i}": "more"})
    save(LAYERS)
    forget(catalog, 2, 3, 4)
    kept = count(catalog)
    assert added(before, kept)
    preview = collect(catalog, dry_run=True)
    assert count(catalog) == kept
    found = collect(catalog)
    assert (found.condemned, found.sparse, found.dropped) == (
        preview.condemned,
        preview.sparse,
        preview.dropped,
    )
    assert count(catalog) == before
    assert [version.number for version in list_log(catalog)] == [5, 1]
    assert len(load_entries(catalog, 1)) == 301
    assert find_faults(catalog) == []
    assert collect(catalog) == Condemned([], [], [], [], [])


def test_a_gc_that_was_killed_between_slices_is_finished_by_the_next(
    catalog: Catalog, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(LAYERS)
    collect(catalog)
    before = count(catalog)
    save({fqn: f"other {text}" for fqn, text in LAYERS.items()})
    save(LAYERS)
    forget(catalog, 2)
    monkeypatch.setattr(sweeping, "_SLICE", 2)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr("dcpstore.catalog.maintenance.condemn._go_on", fail)
        with pytest.raises(KeyboardInterrupt):
            collect(catalog)
    assert count(catalog)["loose"]
    assert [version.number for version in list_log(catalog)] == [3, 1]
    found = collect(catalog)
    # Packs of v2, and those that v3 wrote for nothing.
    assert len(found.condemned) == 2 * len(LAYERS)
    assert count(catalog) == before


def test_a_node_that_is_used_again_is_not_loose(catalog: Catalog, save: Save) -> None:
    save({"w": "a"})
    save({"w": "b"})
    forget(catalog, 2)
    save({"w": "b"})
    collect(catalog)
    (entry,) = load_entries(catalog, 3, ["w"])
    assert entry.tensor is not None
    assert entry.tensor.digest == digest_of("b")
    assert count(catalog)["loose"] == 0


def test_an_aborted_save_leaves_no_tree(catalog: Catalog, save: Save) -> None:
    save({"w": "a"})
    collect(catalog)
    before = count(catalog)
    begin_save(catalog, make_draft("u"))
    version = tables.version
    with catalog.database.write() as connection:
        pending = connection.scalar(select(version.c.id).where(version.c.uid == "u")) or 0
        root = write_content(connection, pending, make_content("u", {"w": "b"})).root
        connection.execute(version.update().where(version.c.id == pending).values(root=root))
    collect(catalog)
    assert added(before, count(catalog))  # it is still pending
    abort_save(catalog, "u", "given up")
    assert [pack.key for pack in collect(catalog).condemned] == ["packs/u/0-0.pack"]
    assert count(catalog) == before


def test_gc_with_nothing_to_do_reads_no_table_that_grows(
    catalog: Catalog, save: Save, database_url: str
) -> None:
    if not database_url.startswith("sqlite"):
        pytest.skip("reads the plans of SQLite")
    save(LAYERS)
    collect(catalog)
    statements: list[str] = []
    with catalog.database.traced(statements.append):
        collect(catalog)
    with catalog.database.outside() as driver:
        for statement in statements:
            if statement.startswith(("SELECT", "UPDATE", "DELETE", "INSERT", "WITH")):
                values = [None] * statement.count("?")
                rows = driver.execute(f"EXPLAIN QUERY PLAN {statement}", values).fetchall()
                scanned = {row[3].split()[1] for row in rows if row[3].startswith("SCAN")}
                assert not scanned & {*GROWING, "pack"}, statement


def test_a_broken_tree_is_a_fault(catalog: Catalog, save: Save) -> None:
    save(LAYERS)
    assert find_faults(catalog) == []
    with catalog.database.write() as connection:
        lonely = {"digest": b"1", "level": 1}
        connection.execute(insert(tables.node), lonely)
        root = connection.scalar(select(tables.version.c.root))
        leaf = connection.scalar(select(tables.node.c.id).where(tables.node.c.level == 0))
        connection.execute(insert(tables.child).values(node=root, first="~", child=leaf))
    texts = [fault.text for fault in find_faults(catalog)]
    assert len(texts) == 2
    assert all("has no children of the level below it" in text for text in texts)
    with catalog.database.write() as connection:
        connection.execute(tables.version.update().values(root=None))
    assert "v1 has no tree of entries" in [fault.text for fault in find_faults(catalog)]
