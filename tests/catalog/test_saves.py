"""Saves: pending is unseen, a commit is whole or nothing, and what is known is reused."""

import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import update

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.read.dedup import find_chunks, find_tensors
from dcpstore.catalog.read.entries import load_chunks, load_entries
from dcpstore.catalog.read.log_filter import list_log
from dcpstore.catalog.read.ref_lookup import list_refs, resolve
from dcpstore.catalog.read.user_sql import query_rows
from dcpstore.catalog.schema import tables as schema
from dcpstore.catalog.write.operations import list_operations
from dcpstore.catalog.write.refs import make_ref
from dcpstore.catalog.write.saves import abort_save, begin_save, commit_save
from dcpstore.errors import (
    AlreadyExistsError,
    ConflictError,
    DcpstoreError,
    InvalidInputError,
    NotFoundError,
)
from dcpstore.records import (
    ChunkPlace,
    ChunkRange,
    NewEntry,
    NewTensor,
    PackRecord,
    RefRecord,
    Version,
)

from .conftest import Save, chunk_digest, digest_of, make_content, make_draft, make_tensor


def condemn(catalog: Catalog, key: str) -> None:
    """What gc will do to a pack."""
    with catalog.database.write() as connection:
        connection.execute(
            update(schema.pack)
            .where(schema.pack.c.key == key)
            .values(status="condemned", condemned_at=datetime.now(UTC))
        )


def test_commit_returns_all_facts_of_the_draft(catalog: Catalog) -> None:
    at = datetime(2026, 3, 4, 5, 6, 7, 89, tzinfo=timezone(timedelta(hours=2)))
    begin_save(
        catalog,
        make_draft(
            "u1",
            step=100,
            message="nach dem Aufwärmen: 'ø' % :x \N{SNOWMAN}",
            tags=("best", "a"),
            metrics={"val_loss": 2.5, "grad": math.nan, "n": 3, "bad": -math.inf},
            labels={"lr": "3e-4", "note": "größer"},
            author="ada",
            host="node-1",
            ranks=4,
        ),
    )
    version = commit_save(catalog, "u1", make_content("u1", {"w": "a"}, created_at=at)).value
    metrics = dict(version.metrics)
    assert math.isnan(metrics.pop("grad"))
    assert metrics == {"bad": -math.inf, "n": 3.0, "val_loss": 2.5}
    expected = Version(
        number=1,
        uid="u1",
        parent=None,
        branch="main",
        step=100,
        tags=("a", "best"),
        message="nach dem Aufwärmen: 'ø' % :x \N{SNOWMAN}",
        metrics=version.metrics,
        labels={"lr": "3e-4", "note": "größer"},
        author="ada",
        host="node-1",
        created_at=at,
        ranks=4,
        nbytes=28,
        nbytes_written=40,
        nbytes_reused=0,
        seconds={"write": 0.25},
    )
    assert version == expected
    assert version.created_at.utcoffset() == timedelta(0)
    assert list_log(catalog) == [version]
    assert [(o.number, o.kind, o.target, o.old, o.new) for o in list_operations(catalog)] == [
        (4, "tag", "a", None, 1),
        (3, "tag", "best", None, 1),
        (2, "save", "main", None, 1),
        (1, "init", "", None, None),
    ]
    assert {o.author for o in list_operations(catalog, limit=3)} == {"ada"}


def test_a_pending_version_is_invisible(catalog: Catalog) -> None:
    begin_save(catalog, make_draft("u1", tags=("best",), metrics={"loss": 1.0}))
    assert list_log(catalog) == []
    assert list_refs(catalog) == []
    for view in ("history", "entries", "storage", "metrics"):
        assert query_rows(catalog, f"SELECT * FROM {view}", {}) == []
    for ref in (None, 1, "best", "main"):
        with pytest.raises(NotFoundError, match="repository is empty"):
            resolve(catalog, ref)


def test_parent_is_the_tip_at_commit_so_two_trainers_interleave(catalog: Catalog) -> None:
    for uid in ("a", "b"):
        begin_save(catalog, make_draft(uid))
    assert commit_save(catalog, "b", make_content("b", {"w": "b"})).value.parent is None
    second = commit_save(catalog, "a", make_content("a", {"w": "a"})).value
    assert (second.number, second.parent) == (2, 1)
    assert list_refs(catalog) == [RefRecord("main", "branch", 2)]
    assert [(o.old, o.new) for o in list_operations(catalog, limit=1)] == [(1, 2)]


def test_numbers_have_no_gaps_though_saves_fail(catalog: Catalog, save: Save) -> None:
    assert save(tags=("t",)).number == 1
    begin_save(catalog, make_draft("doomed", tags=("free",)))
    make_ref(catalog, "free", "tag", version=1, author="")
    with pytest.raises(AlreadyExistsError, match="'free' is taken: it is a tag of v1"):
        commit_save(catalog, "doomed", make_content("doomed", {"w": "x"}))
    assert find_tensors(catalog, [digest_of("x")]) == {}
    abort_save(catalog, "doomed", "tag taken \0 \ud800")
    assert save().number == 2
    assert [o.number for o in list_operations(catalog)] == [5, 4, 3, 2, 1]


def test_new_branch_begins_at_the_parent_that_is_given(catalog: Catalog, save: Save) -> None:
    save()
    save()
    assert save(branch="try", parent=1).parent == 1
    assert save(branch="try").parent == 3
    assert save(branch="alone").parent is None


REFUSED: list[tuple[dict[str, Any], type[DcpstoreError], str]] = [
    ({"branch": "v1"}, InvalidInputError, "branch name 'v1' reads as a version"),
    ({"tags": ("a b",)}, InvalidInputError, "tag name 'a b'"),
    ({"tags": ("x", "x")}, InvalidInputError, "duplicate tags"),
    ({"tags": ("main",)}, AlreadyExistsError, "'main' cannot be both"),
    ({"tags": ("best",)}, AlreadyExistsError, "'best' is taken: it is a tag of v1"),
    ({"tags": ("main",), "branch": "b"}, AlreadyExistsError, "'main' is taken: it is a branch"),
    ({"branch": "best"}, AlreadyExistsError, "'best' is taken"),
    ({"parent": 9}, NotFoundError, "no version v9; the newest is v2"),
    ({"parent": 1}, ConflictError, "is at v2, which is not the parent"),
    ({"expect_tip": 1}, ConflictError, "is at v2, not at v1 as expect_tip"),
    ({"expect_tip": 1, "branch": "new"}, ConflictError, "has no version yet, not at v1"),
    ({"metrics": {"loss": True}}, InvalidInputError, "metric 'loss' is True"),
    ({"metrics": {"loss": 10**400}}, InvalidInputError, "metric 'loss' is 1000"),
    ({"metrics": {"loss": "2"}}, InvalidInputError, "metric 'loss' is '2'"),
    ({"metrics": {"a\0": 1.0}}, InvalidInputError, "NUL"),
    ({"message": "a\0b"}, InvalidInputError, "message 'a.x00b'"),
    ({"author": "\ud800"}, InvalidInputError, "lone surrogates"),
    ({"step": -1}, InvalidInputError, "step -1"),
    ({"step": 2**63}, InvalidInputError, "step"),
    ({"step": 1.5}, InvalidInputError, "step 1.5"),
]


def test_begin_refuses_what_commit_could_not_store(catalog: Catalog, save: Save) -> None:
    save(tags=("best",))
    save()
    for fields, error, match in REFUSED:
        with pytest.raises(error, match=match):
            print(
                fields, begin_save(catalog, make_draft("new", **fields))
            )  # shows which one passed
    assert query_rows(catalog, "SELECT count(*) AS n FROM version", {})[0].n == 2


@pytest.mark.parametrize(
    ("fields", "match"),
    [({"expect_tip": 1}, "not at v1 as expect_tip"), ({"parent": 1}, "not the parent")],
)
def test_branch_that_moved_meanwhile_is_a_conflict(
    catalog: Catalog, save: Save, fields: dict[str, int], match: str
) -> None:
    save()
    begin_save(catalog, make_draft("slow", **fields))
    save()
    with pytest.raises(ConflictError, match=match):
        commit_save(catalog, "slow", make_content("slow", {"w": "slow"}))
    assert [v.number for v in list_log(catalog)] == [2, 1]


def test_a_save_ends_once(catalog: Catalog, save: Save) -> None:
    done = save().uid
    with pytest.raises(ConflictError, match="committed as v1 already"):
        commit_save(catalog, done, make_content("again", {"w": "x"}))
    with pytest.raises(ConflictError, match="committed as v1 already"):
        abort_save(catalog, done, "late")
    begin_save(catalog, make_draft("u2"))
    abort_save(catalog, "u2", "disk full")
    abort_save(catalog, "u2", "again")
    with pytest.raises(ConflictError, match=r"aborted already \(disk full\)"):
        commit_save(catalog, "u2", make_content("u2", {"w": "x"}))
    with pytest.raises(NotFoundError, match="no save 'u3'"):
        commit_save(catalog, "u3", make_content("u3", {"w": "x"}))
    with pytest.raises(ConflictError):
        begin_save(catalog, make_draft("u2"))


def test_known_content_is_found_and_reused(catalog: Catalog, save: Save) -> None:
    first = save({"w": "same"})
    digests = [chunk_digest("same", 0, i) for i in range(3)] + [b"?" * 32]
    places = find_chunks(catalog, digests, "none")
    pack = f"packs/{first.uid}/0-0.pack"
    assert places == {digests[i]: ChunkPlace(pack, 10 * i, 10) for i in range(3)}
    assert find_chunks(catalog, digests, "zstd") == {}
    assert find_chunks(catalog, [], "none") == {}
    assert set(find_tensors(catalog, [digest_of("same"), digest_of("other")])) == {
        digest_of("same")
    }
    assert find_tensors(catalog, []) == {}

    begin_save(catalog, make_draft("u2"))
    known = NewTensor(digest_of("same"), "float32", (7,), "none", 28, ())
    commit_save(catalog, "u2", make_content("u2", {"v": "same"}, tensors=[known], packs=[]))
    (old,) = load_entries(catalog, 1, ["w"])
    (new,) = load_entries(catalog, 2, ["v"])
    assert old.tensor == new.tensor
    assert query_rows(catalog, "SELECT count(*) AS n FROM chunk", {})[0].n == 4


def test_tied_tensors_and_racing_ones_are_stored_once(catalog: Catalog) -> None:
    for uid in ("a", "b"):
        begin_save(catalog, make_draft(uid))
    commit_save(catalog, "a", make_content("a", {"in": "tied", "out": "tied"}))
    commit_save(catalog, "b", make_content("b", {"in": "tied"}))
    assert query_rows(catalog, "SELECT count(*) AS n FROM tensor", {})[0].n == 1
    (entry,) = load_entries(catalog, 2, ["in"])
    assert entry.tensor is not None
    found = load_chunks(catalog, [ChunkRange(entry.tensor.id, 0, 0, 0)])
    assert {chunk.pack for chunk in found} == {"packs/a/0-0.pack"}


def test_new_tensor_may_lie_in_packs_of_other_versions(catalog: Catalog, save: Save) -> None:
    first = save({"w": "one"})
    begin_save(catalog, make_draft("u2"))
    tensor = make_tensor("two", f"packs/{first.uid}/0-0.pack")
    commit_save(catalog, "u2", make_content("u2", {"w": "two"}, tensors=[tensor], packs=[]))
    assert [row.pack for row in query_rows(catalog, "SELECT pack FROM storage", {})] == [
        f"packs/{first.uid}/0-0.pack"
    ]


def test_empty_tensor_and_pack_without_chunks(catalog: Catalog) -> None:
    begin_save(catalog, make_draft("u"))
    grid = make_tensor("x", "p").parts[0]
    empty = NewTensor(digest_of("empty"), "int8", (0,), "none", 0, (type(grid)((0,), (0,), (1,)),))
    commit_save(
        catalog,
        "u",
        make_content(
            "u",
            {},
            tensors=[empty],
            entries=[NewEntry("e", ("e",), "tensor", digest_of("empty"))],
            packs=[PackRecord("packs/u/0-0.pack", 0)],
        ),
    )
    (entry,) = load_entries(catalog, 1)
    assert entry.tensor is not None
    assert (entry.tensor.shape, entry.tensor.nbytes) == ((0,), 0)
    assert list(find_tensors(catalog, [digest_of("empty")])) == [digest_of("empty")]


def test_condemned_packs_are_never_reused(catalog: Catalog, save: Save) -> None:
    pack = f"packs/{save({'w': 'same'}).uid}/0-0.pack"
    for uid in ("tensor", "chunks", "again"):
        begin_save(catalog, make_draft(uid))
    condemn(catalog, pack)
    assert find_tensors(catalog, [digest_of("same")]) == {}
    assert find_chunks(catalog, [chunk_digest("same", 0, 0)], "none") == {}
    known = NewTensor(digest_of("same"), "float32", (7,), "none", 28, ())
    with pytest.raises(ConflictError, match="Save again"):
        commit_save(catalog, "tensor", make_content("tensor", {"w": "same"}, tensors=[known]))
    tensor = make_tensor("other", pack)
    with pytest.raises(ConflictError, match="Save again"):
        commit_save(catalog, "chunks", make_content("chunks", {"w": "other"}, tensors=[tensor]))
    # A second save writes the bytes again, perhaps with another codec; the content is equal.
    version = commit_save(
        catalog, "again", make_content("again", {"w": "same"}, codec="zstd")
    ).value
    (entry,) = load_entries(catalog, version.number, ["w"])
    assert entry.tensor is not None
    assert entry.tensor.codec == "zstd"
    chunks = load_chunks(catalog, [ChunkRange(entry.tensor.id, p, 0, 9) for p in (0, 1)])
    assert [chunk.pack for chunk in chunks] == ["packs/again/0-0.pack"] * 4
    assert set(find_tensors(catalog, [digest_of("same")])) == {digest_of("same")}


def test_deleted_content_is_a_conflict(catalog: Catalog) -> None:
    begin_save(catalog, make_draft("u"))
    entries = [NewEntry("w", ("w",), "tensor", digest_of("unknown"))]
    unknown = NewTensor(digest_of("gone"), "float32", (7,), "none", 28, make_tensor("x", "p").parts)
    with pytest.raises(ConflictError, match=rf"content {digest_of('unknown')}.*Save again"):
        commit_save(catalog, "u", make_content("u", {}, entries=entries))
    with pytest.raises(ConflictError, match=rf"content {digest_of('gone')}.*Save again"):
        commit_save(catalog, "u", make_content("u", {}, tensors=[unknown]))
    assert list_log(catalog) == []
    assert find_tensors(catalog, [digest_of("unknown")]) == {}
    assert query_rows(catalog, "SELECT count(*) AS n FROM pack", {})[0].n == 0
    assert commit_save(catalog, "u", make_content("u", {"w": "fine"})).value.number == 1


def test_content_with_another_grid_is_found_by_its_alias(catalog: Catalog) -> None:
    begin_save(catalog, make_draft("u"))
    commit_save(
        catalog,
        "u",
        make_content("u", {"w": "A"}, aliases={digest_of("otherwise"): digest_of("A")}),
    )
    found = find_tensors(catalog, [digest_of("otherwise"), digest_of("A"), digest_of("unknown")])
    assert (
        found[digest_of("otherwise")]
        == found[digest_of("A")]
        == load_entries(catalog, 1, ["w"])[0].tensor
    )
    assert len(found) == 2
    begin_save(catalog, make_draft("u2"))
    commit_save(
        catalog,
        "u2",
        make_content("u2", {"w": "A"}, aliases={digest_of("otherwise"): digest_of("A")}),
    )
    condemn(catalog, "packs/u/0-0.pack")
    assert find_tensors(catalog, [digest_of("otherwise")]) == {}


def test_an_fqn_that_a_database_cannot_store_is_refused(catalog: Catalog) -> None:
    begin_save(catalog, make_draft("u"))
    with pytest.raises(InvalidInputError, match=r"FQN 'a.x00'"):
        commit_save(catalog, "u", make_content("u", {"a\0": "x"}))


def test_a_value_that_a_database_cannot_store_is_refused(catalog: Catalog) -> None:
    begin_save(catalog, make_draft("u"))
    entry = NewEntry("lr", ("lr",), "value", value='"\0"')
    with pytest.raises(InvalidInputError, match="value of 'lr'"):
        commit_save(catalog, "u", make_content("u", {}, entries=[entry]))
