"""Reading: history, entries, chunks and plan are what was saved, in the same few queries."""

import math
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.read.dedup import find_chunks, find_tensors
from dcpstore.catalog.read.entries import _merged, load_chunks, load_entries, load_plan
from dcpstore.catalog.read.log_filter import list_log
from dcpstore.catalog.read.ref_lookup import resolve
from dcpstore.catalog.read.user_sql import query_rows
from dcpstore.catalog.write.saves import begin_save, commit_save
from dcpstore.errors import NotFoundError
from dcpstore.geometry.boxes import Box
from dcpstore.records import ChunkRange, EntryRecord, PlanRecord, ShardRecord, TensorRecord

from .conftest import Save, chunk_digest, digest_of, make_content, make_draft, make_tensor


def test_log_follows_parents_newest_first(catalog: Catalog, save: Save) -> None:
    save()
    save()
    save(branch="try", parent=1)
    save()
    assert [v.number for v in list_log(catalog)] == [4, 3, 2, 1]
    assert [v.number for v in list_log(catalog, limit=2)] == [4, 3]
    assert [v.number for v in list_log(catalog, 4)] == [4, 2, 1]
    assert [v.number for v in list_log(catalog, 3)] == [3, 1]
    assert [v.number for v in list_log(catalog, 4, limit=2)] == [4, 2]
    assert list_log(catalog, limit=0) == list_log(catalog, 4, limit=0) == []
    with pytest.raises(NotFoundError, match="no version v9"):
        list_log(catalog, 9)


def test_number_of_queries_does_not_grow(catalog: Catalog, save: Save) -> None:
    counts = []
    for many in (60, 110):  # rows of SQLite go in by fifties, and the rest of them
        version = save({f"layer.{i}": f"{many} {i}" for i in range(many)}, tags=(f"t{many}",))
        for _ in range(many):
            save(metrics={"a": 1.0, "b": 2.0})
        seen: list[str] = []
        with catalog.database.traced(seen.append):
            list_log(catalog)
            list_log(catalog, version.number)
            entries = load_entries(catalog, version.number)
            load_entries(catalog, version.number, [entry.fqn for entry in entries])
            tensors = [entry.tensor for entry in entries if entry.tensor is not None]
            load_chunks(catalog, [ChunkRange(t.id, p, 0, 9) for t in tensors for p in (0, 1)])
            resolve(catalog, "main~1")
            find_tensors(catalog, [t.digest for t in tensors])
            find_chunks(catalog, [chunk_digest(f"{many} {i}", 0, 0) for i in range(many)], "none")
            begin_save(catalog, make_draft(f"x{many}"))
            content = make_content(f"x{many}", {f"w{i}": f"x{many} {i}" for i in range(many)})
            commit_save(catalog, f"x{many}", content)
        counts.append(len(seen))
    assert counts[0] == counts[1]


def test_entries_are_sorted_and_whole(catalog: Catalog, save: Save) -> None:
    save({"model.b": "B", "model.a": "A", "Z": "A"})
    found = load_entries(catalog, 1)
    assert [entry.fqn for entry in found] == ["Z", "model.a", "model.b", "optim.lr"]
    assert found[3] == EntryRecord("optim.lr", ("optim", 0, "lr"), "value", None, "0.001")
    assert found[0].tensor is found[1].tensor
    tensor = found[2].tensor
    assert tensor is not None
    made = make_tensor("B", "")
    expected = TensorRecord(tensor.id, digest_of("B"), "float32", (7,), "none", 28, made.parts)
    assert tensor == expected
    assert load_entries(catalog, 1, ["model.b", "Z"]) == [found[0], found[2]]
    assert load_entries(catalog, 1, []) == []


def test_unknown_fqns_are_all_named(catalog: Catalog, save: Save) -> None:
    save({"model.embed.weight": "A"})
    with pytest.raises(NotFoundError) as caught:
        load_entries(catalog, 1, ["model.embd.weight", "optim.lr", "z\0z\ud800"])
    message = str(caught.value)
    assert "v1 has no entry for 2 FQNs" in message
    assert "'model.embd.weight' (did you mean 'model.embed.weight'?)" in message
    assert r"'z\x00z\ud800'" in message
    with pytest.raises(NotFoundError, match=r"for 15 FQNs(?s:.*)and 5 more"):
        load_entries(catalog, 1, [f"unknown {i}" for i in range(15)])
    with pytest.raises(NotFoundError, match=r"^v1 has no entry 'nope'\. See 'dcpstore ls v1'"):
        load_entries(catalog, 1, ["nope"])
    with pytest.raises(
        NotFoundError, match=r"no entry 'optim\.l' \(did you mean 'optim\.lr'\?\)\. "
    ):
        load_entries(catalog, 1, ["optim.l"])
    with pytest.raises(NotFoundError, match="no version v2"):
        load_entries(catalog, 2)


def test_chunks_are_those_of_the_ranges_once_and_in_pack_order(
    catalog: Catalog, save: Save
) -> None:
    save({"b": "B", "a": "A"})
    tensors = {entry.fqn: entry.tensor for entry in load_entries(catalog, 1, ["a", "b"])}
    a, b = tensors["a"], tensors["b"]
    assert a is not None
    assert b is not None
    wanted = [
        ChunkRange(b.id, 0, 1, 2),
        ChunkRange(a.id, 1, 0, 0),
        ChunkRange(a.id, 0, 0, 0),
        ChunkRange(b.id, 0, 2, 2),
        ChunkRange(b.id, 0, 2, 2),
        ChunkRange(b.id, 7, 0, 9),
    ]
    found = load_chunks(catalog, wanted)
    assert [(c.tensor_id, c.part, c.ordinal) for c in found] == [
        (a.id, 0, 0),
        (a.id, 1, 0),
        (b.id, 0, 1),
        (b.id, 0, 2),
    ]
    assert [c.digest for c in found[:2]] == [chunk_digest("A", 0, 0), chunk_digest("A", 1, 0)]
    assert [(c.pack, c.offset, c.length) for c in found[2:]] == [
        ("packs/save-1/0-1.pack", 10, 10),
        ("packs/save-1/0-1.pack", 20, 10),
    ]
    assert load_chunks(catalog, []) == []


def test_more_keys_than_a_statement_has_parameters(catalog: Catalog, save: Save) -> None:
    save({"w": "W"})
    (entry,) = load_entries(catalog, 1, ["w"])
    assert entry.tensor is not None
    ranges = [ChunkRange(entry.tensor.id + 2 * i, 0, 1, 1) for i in range(70_000)]
    assert len(load_chunks(catalog, ranges)) == 1
    digests = [i.to_bytes(32, "big") for i in range(70_000)]
    assert len(find_chunks(catalog, [*digests, chunk_digest("W", 0, 0)], "none")) == 1
    names = [f"{i:064}" for i in range(70_000)]
    assert len(find_tensors(catalog, [*names, digest_of("W")])) == 1


@given(
    st.lists(
        st.tuples(st.integers(1, 2), st.integers(0, 1), st.integers(0, 9), st.integers(0, 5)),
        max_size=8,
    )
)
def test_merged_ranges_hold_the_same_chunks_once(drawn: list[tuple[int, int, int, int]]) -> None:
    ranges = [ChunkRange(t, p, first, first + more) for t, p, first, more in drawn]

    def chunks(some: list[ChunkRange]) -> list[tuple[int, int, int]]:
        return [(t, p, i) for t, p, first, last in some for i in range(first, last + 1)]

    merged = _merged(ranges)
    assert chunks(merged) == sorted(set(chunks(ranges)))


def test_plan_is_shared_and_keeps_the_order_of_a_ranks_boxes(catalog: Catalog, save: Save) -> None:
    save()
    save()
    plan = load_plan(catalog, 2)
    assert plan == PlanRecord(
        "plan",
        2,
        [
            ShardRecord("w", 0, Box((0,), (5,))),
            ShardRecord("w", 1, Box((5,), (1,))),
            ShardRecord("w", 1, Box((6,), (1,))),
        ],
    )
    assert load_plan(catalog, 1) == plan
    assert query_rows(catalog, "SELECT count(*) AS n FROM shard", {})[0].n == 3
    with pytest.raises(NotFoundError, match="no version v9"):
        load_plan(catalog, 9)


def test_views_have_stable_columns_and_show_what_the_log_shows(
    catalog: Catalog, save: Save
) -> None:
    save(tags=("b", "a", "C"), step=5, message="m", author="ada", metrics={"loss": 2.5})
    save(ranks=4, metrics={"loss": math.nan})
    history = query_rows(catalog, "SELECT * FROM history ORDER BY version", {})
    assert list(history[0].keys()) == [
        *("version", "uid", "parent", "branch", "step", "tags", "message", "author"),
        *("created_at", "ranks", "nbytes", "nbytes_written"),
    ]
    for row, version in zip(history, reversed(list_log(catalog)), strict=True):
        at = datetime.strptime(row.created_at, "%Y-%m-%d %H:%M:%S.%f").replace(tzinfo=UTC)
        assert at == version.created_at
        for column in set(row.keys()) - {"version", "created_at", "tags"}:
            assert row[column] == getattr(version, column)
        assert (row.version, row.tags) == (version.number, ",".join(version.tags))
    assert [row.tags for row in history] == ["C,a,b", ""]

    rows = query_rows(catalog, "SELECT * FROM entries WHERE version = 1 ORDER BY fqn", {})
    assert [dict(row) for row in rows] == [
        {
            "version": 1,
            "fqn": "optim.lr",
            "kind": "value",
            "dtype": None,
            "shape": None,
            "nbytes": None,
            "value": "0.001",
            "digest": None,
        },
        {
            "version": 1,
            "fqn": "w",
            "kind": "tensor",
            "dtype": "float32",
            "shape": "[7]",
            "nbytes": 28,
            "value": None,
            "digest": digest_of("save-1"),
        },
    ]
    (pack, _) = query_rows(catalog, "SELECT * FROM storage ORDER BY pack", {})
    assert dict(pack) == {
        "pack": "packs/save-1/0-0.pack",
        "version": 1,
        "nbytes": 40,
        "status": "live",
    }
    operations = query_rows(catalog, "SELECT * FROM operations ORDER BY number", {})
    assert [row[:6] for row in operations] == [
        (1, "init", "", None, None, ""),
        (2, "save", "main", None, 1, "ada"),
        (3, "tag", "b", None, 1, "ada"),
        (4, "tag", "a", None, 1, "ada"),
        (5, "tag", "C", None, 1, "ada"),
        (6, "save", "main", 1, 2, ""),
    ]
    metrics = query_rows(catalog, "SELECT * FROM metrics ORDER BY version", {})
    assert metrics == [(1, "loss", 2.5), (2, "loss", None)]
