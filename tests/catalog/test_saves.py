"""Saves: pending is unseen, a commit is whole or nothing, and what is known is reused."""

import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import update

from dcpstore.catalog import Catalog
from dcpstore.catalog.schema import tables as schema
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

from .conftest import Save, chunk_digest, make_content, make_draft, make_tensor


def condemn(catalog: Catalog, key: str) -> None:
    """What gc will do to a pack."""
    with catalog._database.write() as connection:
        connection.execute(
            update(schema.pack)
            .where(schema.pack.c.key == key)
            .values(status="condemned", condemned_at=datetime.now(UTC))
        )


def test_commit_returns_all_that_was_said(catalog: Catalog) -> None:
    at = datetime(2026, 3, 4, 5, 6, 7, 89, tzinfo=timezone(timedelta(hours=2)))
    catalog.begin(
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
        )
    )
    version = catalog.commit("u1", make_content("u1", {"w": "a"}, created_at=at))
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
        created_at=at,
        ranks=4,
        nbytes=28,
        nbytes_written=40,
        nbytes_reused=0,
        seconds={"write": 0.25},
    )
    assert version == expected
    assert version.created_at.utcoffset() == timedelta(0)
    assert catalog.log() == [version]
    assert [(o.number, o.kind, o.target, o.old, o.new) for o in catalog.operations()] == [
        (4, "tag", "a", None, 1),
        (3, "tag", "best", None, 1),
        (2, "save", "main", None, 1),
        (1, "init", "", None, None),
    ]
    assert {o.author for o in catalog.operations(limit=3)} == {"ada"}


def test_pending_version_is_seen_by_nobody(catalog: Catalog) -> None:
    catalog.begin(make_draft("u1", tags=("best",), metrics={"loss": 1.0}))
    assert catalog.log() == []
    assert catalog.refs() == []
    for view in ("history", "entries", "storage", "metrics"):
        assert catalog.query(f"SELECT * FROM {view}", {}) == []
    for ref in (None, 1, "best", "main"):
        with pytest.raises(NotFoundError, match="repository is empty"):
            catalog.resolve(ref)


def test_parent_is_the_tip_at_commit_so_two_trainers_interleave(catalog: Catalog) -> None:
    for uid in ("a", "b"):
        catalog.begin(make_draft(uid))
    assert catalog.commit("b", make_content("b", {"w": "b"})).parent is None
    second = catalog.commit("a", make_content("a", {"w": "a"}))
    assert (second.number, second.parent) == (2, 1)
    assert catalog.refs() == [RefRecord("main", "branch", 2)]
    assert [(o.old, o.new) for o in catalog.operations(limit=1)] == [(1, 2)]


def test_numbers_have_no_gaps_though_saves_fail(catalog: Catalog, save: Save) -> None:
    assert save(tags=("t",)).number == 1
    catalog.begin(make_draft("doomed", tags=("free",)))
    catalog.tag("free", 1, author="")
    with pytest.raises(AlreadyExistsError, match="'free' is taken: it is a tag of v1"):
        catalog.commit("doomed", make_content("doomed", {"w": "x"}))
    assert catalog.find_tensors(["digest of x"]) == {}
    catalog.abort("doomed", "tag taken \0 \ud800")
    assert save().number == 2
    assert [o.number for o in catalog.operations()] == [5, 4, 3, 2, 1]


def test_new_branch_begins_at_the_parent_that_is_given(catalog: Catalog, save: Save) -> None:
    save()
    save()
    assert save(branch="try", parent=1).parent == 1
    assert save(branch="try").parent == 3
    assert save(branch="alone").parent is None


REFUSED: list[tuple[dict[str, Any], type[DcpstoreError], str]] = [
    ({"branch": "v1"}, InvalidInputError, "branch name 'v1' reads as a version"),
    ({"tags": ("a b",)}, InvalidInputError, "tag name 'a b'"),
    ({"tags": ("x", "x")}, InvalidInputError, "name one twice"),
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


def test_begin_refuses_what_commit_could_not_keep(catalog: Catalog, save: Save) -> None:
    save(tags=("best",))
    save()
    for fields, error, match in REFUSED:
        with pytest.raises(error, match=match):
            print(fields, catalog.begin(make_draft("new", **fields)))  # shows which one passed
    assert catalog.query("SELECT count(*) AS n FROM version", {})[0].n == 2


@pytest.mark.parametrize(
    ("fields", "match"),
    [({"expect_tip": 1}, "not at v1 as expect_tip"), ({"parent": 1}, "not the parent")],
)
def test_branch_that_moved_meanwhile_is_a_conflict(
    catalog: Catalog, save: Save, fields: dict[str, int], match: str
) -> None:
    save()
    catalog.begin(make_draft("slow", **fields))
    save()
    with pytest.raises(ConflictError, match=match):
        catalog.commit("slow", make_content("slow", {"w": "slow"}))
    assert [v.number for v in catalog.log()] == [2, 1]


def test_a_save_ends_once(catalog: Catalog, save: Save) -> None:
    done = save().uid
    with pytest.raises(ConflictError, match="committed as v1 already"):
        catalog.commit(done, make_content("again", {"w": "x"}))
    with pytest.raises(ConflictError, match="committed as v1 already"):
        catalog.abort(done, "late")
    catalog.begin(make_draft("u2"))
    catalog.abort("u2", "disk full")
    catalog.abort("u2", "again")
    with pytest.raises(ConflictError, match=r"aborted already \(disk full\)"):
        catalog.commit("u2", make_content("u2", {"w": "x"}))
    with pytest.raises(NotFoundError, match="no save 'u3'"):
        catalog.commit("u3", make_content("u3", {"w": "x"}))
    with pytest.raises(ConflictError):
        catalog.begin(make_draft("u2"))


def test_known_content_is_found_and_reused(catalog: Catalog, save: Save) -> None:
    first = save({"w": "same"})
    digests = [chunk_digest("same", 0, i) for i in range(3)] + [b"?" * 32]
    places = catalog.find_chunks(digests, "none")
    pack = f"packs/{first.uid}/0-0.pack"
    assert places == {digests[i]: ChunkPlace(pack, 10 * i, 10) for i in range(3)}
    assert catalog.find_chunks(digests, "zstd") == {}
    assert catalog.find_chunks([], "none") == {}
    assert set(catalog.find_tensors(["digest of same", "digest of other"])) == {"digest of same"}
    assert catalog.find_tensors([]) == {}

    catalog.begin(make_draft("u2"))
    known = NewTensor("digest of same", "float32", (7,), "none", 28, ())
    catalog.commit("u2", make_content("u2", {"v": "same"}, tensors=[known], packs=[]))
    (old,) = catalog.entries(1, ["w"])
    (new,) = catalog.entries(2, ["v"])
    assert old.tensor == new.tensor
    assert catalog.query("SELECT count(*) AS n FROM chunk", {})[0].n == 4


def test_tied_tensors_and_racing_ones_are_stored_once(catalog: Catalog) -> None:
    for uid in ("a", "b"):
        catalog.begin(make_draft(uid))
    catalog.commit("a", make_content("a", {"in": "tied", "out": "tied"}))
    catalog.commit("b", make_content("b", {"in": "tied"}))
    assert catalog.query("SELECT count(*) AS n FROM tensor", {})[0].n == 1
    (entry,) = catalog.entries(2, ["in"])
    assert entry.tensor is not None
    found = catalog.chunks([ChunkRange(entry.tensor.id, 0, 0, 0)])
    assert {chunk.pack for chunk in found} == {"packs/a/0-0.pack"}


def test_new_tensor_may_lie_in_packs_of_other_versions(catalog: Catalog, save: Save) -> None:
    first = save({"w": "one"})
    catalog.begin(make_draft("u2"))
    tensor = make_tensor("two", f"packs/{first.uid}/0-0.pack")
    catalog.commit("u2", make_content("u2", {"w": "two"}, tensors=[tensor], packs=[]))
    assert [row.pack for row in catalog.query("SELECT pack FROM storage", {})] == [
        f"packs/{first.uid}/0-0.pack"
    ]


def test_empty_tensor_and_pack_without_chunks(catalog: Catalog) -> None:
    catalog.begin(make_draft("u"))
    grid = make_tensor("x", "p").parts[0]
    empty = NewTensor("empty", "int8", (0,), "none", 0, (type(grid)((0,), (0,), (1,)),))
    catalog.commit(
        "u",
        make_content(
            "u",
            {},
            tensors=[empty],
            entries=[NewEntry("e", ("e",), "tensor", "empty")],
            packs=[PackRecord("packs/u/0-0.pack", 0)],
        ),
    )
    (entry,) = catalog.entries(1)
    assert entry.tensor is not None
    assert (entry.tensor.shape, entry.tensor.nbytes) == ((0,), 0)
    assert list(catalog.find_tensors(["empty"])) == ["empty"]


def test_condemned_packs_are_never_reused(catalog: Catalog, save: Save) -> None:
    pack = f"packs/{save({'w': 'same'}).uid}/0-0.pack"
    for uid in ("tensor", "chunks", "anew"):
        catalog.begin(make_draft(uid))
    condemn(catalog, pack)
    assert catalog.find_tensors(["digest of same"]) == {}
    assert catalog.find_chunks([chunk_digest("same", 0, 0)], "none") == {}
    known = NewTensor("digest of same", "float32", (7,), "none", 28, ())
    with pytest.raises(ConflictError, match="Save again"):
        catalog.commit("tensor", make_content("tensor", {"w": "same"}, tensors=[known]))
    tensor = make_tensor("other", pack)
    with pytest.raises(ConflictError, match="Save again"):
        catalog.commit("chunks", make_content("chunks", {"w": "other"}, tensors=[tensor]))
    # Saving again writes the bytes anew, with another codec maybe; the content is the same.
    version = catalog.commit("anew", make_content("anew", {"w": "same"}, codec="zstd"))
    (entry,) = catalog.entries(version.number, ["w"])
    assert entry.tensor is not None
    assert entry.tensor.codec == "zstd"
    chunks = catalog.chunks([ChunkRange(entry.tensor.id, p, 0, 9) for p in (0, 1)])
    assert [chunk.pack for chunk in chunks] == ["packs/anew/0-0.pack"] * 4
    assert set(catalog.find_tensors(["digest of same"])) == {"digest of same"}


def test_content_that_is_gone_is_a_conflict(catalog: Catalog) -> None:
    catalog.begin(make_draft("u"))
    entries = [NewEntry("w", ("w",), "tensor", "unheard of")]
    unknown = NewTensor("gone", "float32", (7,), "none", 28, make_tensor("x", "p").parts)
    with pytest.raises(ConflictError, match=r"content unheard of.*Save again"):
        catalog.commit("u", make_content("u", {}, entries=entries))
    with pytest.raises(ConflictError, match=r"content gone.*Save again"):
        catalog.commit("u", make_content("u", {}, tensors=[unknown]))
    assert catalog.log() == []
    assert catalog.find_tensors(["a\0", "\ud800"]) == {}
    assert catalog.query("SELECT count(*) AS n FROM pack", {})[0].n == 0
    assert catalog.commit("u", make_content("u", {"w": "fine"})).number == 1


def test_content_cut_otherwise_is_found_by_its_other_digest(catalog: Catalog) -> None:
    catalog.begin(make_draft("u"))
    catalog.commit("u", make_content("u", {"w": "A"}, aliases={"otherwise": "digest of A"}))
    found = catalog.find_tensors(["otherwise", "digest of A", "unknown"])
    assert found["otherwise"] == found["digest of A"] == catalog.entries(1, ["w"])[0].tensor
    assert len(found) == 2
    catalog.begin(make_draft("u2"))
    catalog.commit("u2", make_content("u2", {"w": "A"}, aliases={"otherwise": "digest of A"}))
    condemn(catalog, "packs/u/0-0.pack")
    assert catalog.find_tensors(["otherwise"]) == {}


def test_fqn_that_a_database_cannot_keep_is_refused(catalog: Catalog) -> None:
    catalog.begin(make_draft("u"))
    with pytest.raises(InvalidInputError, match=r"FQN 'a.x00'"):
        catalog.commit("u", make_content("u", {"a\0": "x"}))


def test_value_that_a_database_cannot_keep_is_refused(catalog: Catalog) -> None:
    catalog.begin(make_draft("u"))
    entry = NewEntry("lr", ("lr",), "value", value='"\0"')
    with pytest.raises(InvalidInputError, match="value of 'lr'"):
        catalog.commit("u", make_content("u", {}, entries=[entry]))
