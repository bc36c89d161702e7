"""An upgrade to shared entry sets changes no answer, wherever it is interrupted or disturbed."""

import importlib.util
import itertools
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from dcpstore.catalog.db.database import Database
from dcpstore.catalog.db.url import sqlite_url
from dcpstore.catalog.schema import lifecycle, migrate, revisions, tables
from dcpstore.catalog.schema.lifecycle import plan_upgrade, upgrade_schema
from dcpstore.core.digests import run_digest
from dcpstore.errors import CorruptionError, DcpstoreError
from dcpstore.formats import json_fields
from dcpstore.formats.entry_tree import grow
from dcpstore.geometry.grids import Grid
from dcpstore.records import NewEntry, StatePath, UpgradePlan

from .old_schema import Held, OldCatalog, changing, contents

HEAD = revisions.HEAD


def load_migration() -> Any:
    """Return the migration as a module of its own."""
    path = migrate.migrations_folder() / "versions" / "0003_shared_entry_sets.py"
    spec = importlib.util.spec_from_file_location("migration", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MIGRATION = load_migration()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "_PAUSE", 0)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Set how many entries a batch has, and what is done before each.

    It returns the list in which the entries of each batch are counted.
    """

    def set_size(
        size: int, before: Callable[[sa.Connection, int], None] = lambda connection, number: None
    ) -> list[int]:
        module = load_migration()
        module.BATCH = size
        done: list[int] = []

        class Counted(module.Preparation):  # type: ignore[name-defined, misc]
            def step(self, connection: sa.Connection) -> int:
                before(connection, len(done))
                done.append(super().step(connection))
                return done[-1]

        def preparations(revision: str) -> list[Any]:
            return [Counted()] if revision < "0003" else []

        monkeypatch.setattr(migrate, "preparations", preparations)
        return done

    return set_size


def named(count: int, seed: int) -> list[str]:
    """Return distinct FQNs of any kind of text, sorted."""
    rng = random.Random(seed)
    words = ["layers", "weight", "ünder", "a\nb", "x" * 50, "\U0001d518", '"', "0", "10", "9"]
    names = {
        ".".join(rng.choices(words, k=3)) + f".{rng.randrange(10 * count)}" for _ in range(count)
    }
    return sorted(names)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 500, 9000])
def test_trees_are_those_of_entry_tree(count: int) -> None:
    rng = random.Random(count)
    entries, rows, digests = [], [], {}
    for number, fqn in enumerate(named(count, seed=count)):
        path = rng.choice(
            [(fqn,), StatePath(("a", 1, "ü")), StatePath((fqn,), "."), StatePath("a")]
        )
        is_value = rng.random() < 0.3
        digest = None if is_value else rng.randbytes(32).hex()
        value = '{"ü":"\\u0001"}' if is_value else None
        kind: Any = "value" if is_value else rng.choice(["tensor", "blob"])
        entries.append(NewEntry(fqn, path, kind, digest, value))
        # As an older dcpstore may have written it, with spaces.
        text = json.dumps(json.loads(json_fields.path(path)))
        rows.append((fqn, text, kind, None if is_value else number, value))
        digests[number] = digest
    tree = grow(entries)
    pieces = MIGRATION.Preparation()._pieces(rows)
    sets = [(piece.first, MIGRATION.set_digest(piece.rows, digests)) for piece in pieces]
    groups = MIGRATION._groups(sets)
    assert [digest for _, digest in sets] == [one.digest for one in tree.sets]
    assert [first for first, _ in sets] == [one.child.first for one in tree.sets]
    assert [digest for digest, _ in groups] == [one.digest for one in tree.groups]
    below = [(children[0][0], digest) for digest, children in groups]
    assert MIGRATION.group_digest(below) == tree.root.digest


def test_digests_of_fqns_layouts_and_runs_are_those_of_today() -> None:
    for path in [("a",), StatePath(("a", 0)), StatePath(("ü",), "v"), StatePath(()), ()]:
        text = MIGRATION.path_text(json.dumps(json.loads(json_fields.path(path))))
        assert text == json_fields.path(path)
        assert MIGRATION.fqn_digest("ä.b", text) == tables.fqn_digest("ä.b", path)
    assert MIGRATION.path_text('[["a"]]') == '["a"]' == json_fields.path(StatePath(("a",)))
    assert MIGRATION.path_text("damaged") == "damaged"
    grids = (Grid((0, 0), (4, 6), (2, 6)), Grid((4, 0), (1, 6), (1, 6)))
    shape, parts = (
        MIGRATION.integers("[5, 6]"),
        MIGRATION.grids_text(
            [
                tuple(json_fields.integers(n) for n in (g.offsets, g.shape, g.chunk_shape))
                for g in grids
            ]
        ),
    )
    facts = ("blake3", "bfloat16", shape, "zstd")
    assert parts == json_fields.grids(grids)
    assert MIGRATION.layout_digest(*facts, parts) == tables.layout_digest(
        "blake3", "bfloat16", (5, 6), "zstd", grids
    )
    chunks = [bytes([i]) * 32 for i in range(3)]
    assert MIGRATION.run_digest("zstd", chunks) == run_digest("zstd", chunks)


def state_at(step: int, count: int = 30) -> dict[str, Held | str]:
    """Return tensors of which two change a step: small, large, of many parts; and values."""
    large = [f"large {i}" for i in range(40)]
    large[step % 40] = f"changed {step}"
    state: dict[str, Held | str] = {f"fixed.{i}": Held((f"fixed {i}",)) for i in range(count)}
    state |= {
        "moving": Held((f"moving {step}", "same")),
        "large": Held(large),
        "parts": Held([f"part {step // 3} {i}" for i in range(50)], (1, 3, 20, 26)),
        "zeros": Held(["zero"] * 64, codec="zstd"),
        "few parts": Held(["p", "q", "r"], (2, 1)),
        "empty": Held(()),
        "step": str(step),
        "note": '"ünder"',
    }
    return state


def filled(url: str, revision: str = "0002") -> OldCatalog:
    """Make an old catalog of versions that are committed, expired, forgotten, pending or empty."""
    old = OldCatalog(url, revision)
    with changing(url) as connection:
        versions = [old.save(connection, state_at(step)) for step in range(6)]
        old.save(connection, {})
        old.save(connection, {"a": "1"}, paths={"a": '[["a", "b"], "  "]'})
        old.begin(connection)
        old.expire(connection, versions[0])
        old.expire(connection, versions[3], forget=True)
    return old


@pytest.mark.parametrize("revision", ["0001", "0002"])
def test_nothing_is_lost_and_the_old_tables_are_gone(database_url: str, revision: str) -> None:
    filled(database_url, revision)
    before = contents(database_url)
    assert upgrade_schema(database_url) == (revision, HEAD)
    assert contents(database_url) == before
    with changing(database_url) as connection:
        assert set(sa.inspect(connection).get_table_names()) == {
            *tables.tables.tables,
            "alembic_version",
        }
        expected = "SELECT id FROM pack WHERE status = 'live'"
        unjudged = connection.scalars(sa.text("SELECT pack FROM unjudged")).all()
        assert sorted(unjudged) == sorted(connection.scalars(sa.text(expected)))
        roots = "SELECT count(*) FROM version WHERE (root IS NULL) <> (plan IS NULL)"
        assert connection.scalar(sa.text(roots)) == 0
        # Their manifests have no pages, so gc writes them again.
        roots = "SELECT count(*) FROM version WHERE (stale IS NULL) <> (plan IS NULL)"
        assert connection.scalar(sa.text(roots)) == 0


def test_versions_share_what_they_have_in_common(database_url: str) -> None:
    old = OldCatalog(database_url)
    states = [{f"layer{i:03}": Held((f"{i}",)) for i in range(500)} for _ in range(4)]
    states[2]["layer250"] = Held(("other",))
    with changing(database_url) as connection:
        for state in states:
            old.save(connection, state)
    upgrade_schema(database_url)
    with changing(database_url) as connection:

        def count(what: str) -> Any:
            return connection.scalar(sa.text(f"SELECT count(*) FROM {what}"))

        sets = len(grow([NewEntry(fqn, (fqn,), "tensor", "x") for fqn in states[0]]).sets)
        assert count("node WHERE level = 0") == sets + 1
        assert count("node WHERE level > 0") == 4
        assert count("fqn") == 500
        assert count("layout") == 1
        # The root of the third version differs from the others.
        roots = list(connection.scalars(sa.text("SELECT root FROM version ORDER BY number")))
        assert [roots.index(root) for root in roots] == [0, 0, 2, 0]


class EndedError(Exception):
    """The process ends here."""


@contextmanager
def ended_at(number: int) -> Iterator[None]:
    """Let the statement of this number, from 1, and all after it, not be sent."""
    sent = itertools.count(1)

    def before(*_: object) -> None:
        if next(sent) >= number:
            raise EndedError

    sa.event.listen(sa.Engine, "before_cursor_execute", before)
    try:
        yield
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", before)


def test_it_may_end_at_any_statement_and_goes_on(
    database_url: str, small_batches: Callable[..., list[int]]
) -> None:
    filled(database_url)
    before = contents(database_url)
    sizes = small_batches(60)
    number, step = 1, 2 if database_url.startswith("sqlite") else 15
    while True:
        try:
            with ended_at(number):
                upgrade_schema(database_url)
            break
        except EndedError:
            # What is there of the old schema is whole: the older dcpstore can use it.
            assert contents(database_url) == before
        number += step
    assert number > 90
    assert contents(database_url) == before
    assert upgrade_schema(database_url) == (HEAD, HEAD)
    # What was converted was not converted again.
    assert sum(sizes) == len(before["entries"])


def test_batches_are_bounded(database_url: str, small_batches: Callable[..., list[int]]) -> None:
    old = OldCatalog(database_url)
    sizes = small_batches(2000)
    with changing(database_url) as connection:
        for step in range(200):
            state = {f"{i:04}": Held((f"{i} {step if i == step else ''}",)) for i in range(298)}
            old.save(connection, state | {"step": str(step)} | {"x": "1"})
        old.save(connection, {f"{i:05}": "1" for i in range(5003)})
    before = contents(database_url)
    upgrade_schema(database_url)
    assert contents(database_url) == before
    assert sum(sizes) == 200 * 300 + 5003
    # Whole versions, as many as fit; one that does not fit is a batch of its own.
    assert sorted(set(sizes)) in ([0, 1200, 1800, 5003], [0, 600, 1800, 5003])


def test_what_the_older_dcpstore_does_meanwhile_is_kept(
    database_url: str, small_batches: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = filled(database_url)
    moved, small, large = Held(["m"] * 33), Held(("s",)), Held([f"d{i}" for i in range(20)])
    with changing(database_url) as connection:
        pending = [old.begin(connection), old.begin(connection)]
        doomed = old.save(connection, {"doomed": large, "fixed.0": Held(("fixed 0",))})
        old.save(connection, {"moved": moved, "small": small})

    def disturb(connection: sa.Connection, number: int) -> None:
        """Do what an older dcpstore does, before a batch."""
        if number == 2:
            old.save(connection, state_at(50))
        if number == 5:
            old.save(connection, state_at(51), pending=pending[0])

    def prepare(database: Database, revision: str) -> None:
        real(database, revision)
        with changing(database_url) as connection:
            old.expire(connection, doomed)
            old.collect(connection)
            old.move(connection, moved, codec="blosc")
            old.move(connection, small, codec="blosc")
            old.save(connection, state_at(52) | {"one more": "1"})
            old.save(connection, {"late": "1"}, pending=pending[1])
        expected.append(contents(database_url))

    expected: list[Any] = []
    real = lifecycle._prepare
    monkeypatch.setattr(lifecycle, "_prepare", prepare)
    sizes = small_batches(60, disturb)
    upgrade_schema(database_url)
    assert len(sizes) > 6
    found = contents(database_url)
    assert found == expected[0]
    assert {row[0] for row in found["entries"]} == {2, 3, 4, 5, 6, 8, 10, 11, 12, 13, 14}
    with changing(database_url) as connection:
        # Nothing is left of what was dropped.
        for orphans in (
            "fqn WHERE id NOT IN (SELECT fqn FROM entry)",
            "layout WHERE id NOT IN (SELECT layout FROM tensor WHERE layout > 0)",
            "tensor WHERE layout > 0 AND id NOT IN (SELECT tensor FROM entry WHERE tensor > 0)",
            "tensor WHERE layout IS NULL AND id NOT IN (SELECT run FROM run)",
            "node WHERE level < 2 AND id NOT IN (SELECT child FROM child)",
            "node WHERE level = 2 AND id NOT IN (SELECT root FROM version WHERE root > 0)",
        ):
            assert connection.scalar(sa.text(f"SELECT count(*) FROM {orphans}")) == 0, orphans


def test_a_run_in_two_places_takes_the_good_one(database_url: str) -> None:
    old = OldCatalog(database_url)
    one, other = (Held([*(f"{i}" for i in range(16)), last]) for last in ("x", "y"))
    with changing(database_url) as connection:
        versions = [old.save(connection, {"w": held}, reuse=False) for held in (one, other, one)]
        pack = "SELECT MIN(pack) FROM chunk"  # in which the chunks of the first tensor are
        connection.execute(sa.text(f"UPDATE pack SET damage = 'gone' WHERE id = ({pack})"))
    upgrade_schema(database_url)
    with changing(database_url) as connection:
        packs = connection.execute(
            sa.text(
                "SELECT k.damage, count(*) FROM chunk c JOIN pack k ON k.id = c.pack"
                " GROUP BY k.damage ORDER BY 2"
            )
        ).all()
        assert [tuple(row) for row in packs] == [("gone", 1), (None, 17)]
        # Manifests may name places that the catalog does not, so gc writes all of them again.
        stale = "SELECT id FROM version WHERE stale <> '' ORDER BY id"
        assert connection.scalars(sa.text(stale)).all() == versions


def test_two_upgrades_at_once(database_url: str, small_batches: Callable[..., list[int]]) -> None:
    filled(database_url)
    before = contents(database_url)
    sizes = small_batches(60)
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(upgrade_schema, [database_url] * 3))
    assert sorted(found) == [("0002", HEAD), (HEAD, HEAD), (HEAD, HEAD)]
    assert contents(database_url) == before
    assert sum(sizes) == len(before["entries"])


@pytest.mark.parametrize("revision", ["0001", "0002"])
def test_a_plan_changes_nothing_and_locks_nothing(database_url: str, revision: str) -> None:
    filled(database_url, revision)
    with changing(database_url) as connection:
        names = sorted(sa.inspect(connection).get_table_names())
    before = contents(database_url)
    with changing(database_url) as connection:
        connection.execute(sa.text("UPDATE repository SET last_operation = 1"))
        with ThreadPoolExecutor(1) as other:  # while this one holds the lock
            plan = other.submit(plan_upgrade, database_url).result()
    assert (plan.before, plan.after) == (revision, HEAD)
    assert (plan.versions, plan.entries) == (7, len(before["entries"]))
    assert contents(database_url) == before
    with changing(database_url) as connection:
        assert sorted(sa.inspect(connection).get_table_names()) == names
        tensors, chunks = (
            connection.scalar(sa.text(f"SELECT count(*) FROM {name}"))
            for name in ("tensor", "chunk")
        )
    assert (plan.tensors, plan.chunks) == (tensors, chunks)
    upgrade_schema(database_url)
    with changing(database_url) as connection:
        made = ("node", "child", "fqn", "layout", "tensor", "run", "entry", "chunk", "alias")
        counts = " + ".join(f"(SELECT count(*) FROM {name})" for name in made)
        rows = connection.scalar(sa.text(f"SELECT {counts}"))
    assert rows / 2 < plan.rows < rows * 2
    assert 20 * rows < plan.nbytes < 4000 * rows
    plan = plan_upgrade(database_url)
    assert plan == UpgradePlan(before=HEAD, after=HEAD)


def test_a_plan_counts_what_is_left(
    database_url: str, small_batches: Callable[..., list[int]]
) -> None:
    filled(database_url)
    plan = plan_upgrade(database_url)

    def end(connection: sa.Connection, number: int) -> None:
        if number == 2:
            raise EndedError

    small_batches(60, end)
    with pytest.raises(EndedError):
        upgrade_schema(database_url)
    rest = plan_upgrade(database_url)
    assert 0 < rest.entries < plan.entries
    assert 0 < rest.versions < plan.versions


@pytest.mark.parametrize("what", ["UPDATE tensor SET digest = 'x'", "UPDATE part SET shape = '['"])
def test_a_damaged_catalog_says_so_and_stays(database_url: str, what: str) -> None:
    old = OldCatalog(database_url)
    with changing(database_url) as connection:
        old.save(connection, {"w": Held(("1",))})
        connection.execute(sa.text(what))
    for call in (upgrade_schema, plan_upgrade):
        with pytest.raises(CorruptionError, match=r"is damaged and was not upgraded.*older"):
            call(database_url)
    with changing(database_url) as connection:
        assert sa.inspect(connection).has_table("part")


def test_migrations_that_cannot_be_read_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = sqlite_url(tmp_path / "catalog.db")
    OldCatalog(url)
    monkeypatch.setattr(migrate, "migrations_folder", lambda: tmp_path / "absent")
    with pytest.raises(DcpstoreError, match=r"cannot read the migrations in .*absent.*again"):
        upgrade_schema(url)


def test_the_file_shrinks(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "catalog.db")
    old = OldCatalog(url)
    with changing(url) as connection:
        for _ in range(40):
            old.save(connection, {f"{i:04}": Held((f"{i}",)) for i in range(300)})
    before = (tmp_path / "catalog.db").stat().st_size
    upgrade_schema(url)
    assert (tmp_path / "catalog.db").stat().st_size < before / 2
