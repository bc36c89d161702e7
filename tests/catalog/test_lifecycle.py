"""The life of a catalog: created whole or not at all, refused with the cure, upgraded."""

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import alembic.context
import alembic.op
import pytest
import torch
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import (
    CheckConstraint,
    Column,
    Connection,
    Integer,
    create_engine,
    inspect,
    text,
)
from sqlalchemy.schema import CreateIndex

import dcpstore
from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.db.database import Database
from dcpstore.catalog.db.url import sqlite_url
from dcpstore.catalog.read.log_filter import list_log
from dcpstore.catalog.read.user_sql import query_rows
from dcpstore.catalog.schema import migrate as migrating_module
from dcpstore.catalog.schema import revisions
from dcpstore.catalog.schema import tables as schema
from dcpstore.catalog.schema.lifecycle import upgrade_schema
from dcpstore.catalog.schema.migrate import migrations_folder
from dcpstore.catalog.schema.views import VIEWS
from dcpstore.catalog.write.operations import list_operations
from dcpstore.errors import AlreadyExistsError, InvalidInputError, NotFoundError, SchemaError
from dcpstore.maintenance.rebuild import rebuild
from dcpstore.records import ChunkDefaults
from tests import servers
from tests.soundness import Place, assert_sound


@contextmanager
def writing(url: str) -> Iterator[Connection]:
    """Yield a connection that does to the database what dcpstore would not."""
    database = Database(url)
    database.may_create_file = True
    with database.write() as connection:
        yield connection
    database.close()


def test_created_once_and_found_again(database_url: str) -> None:
    chunk = ChunkDefaults(nbytes=1 << 20, codec="zstd")
    with Catalog.make(database_url, data_url="file:///d", chunk=chunk) as made:
        record = made.repository
    assert (record.data_url, record.format_version, record.chunk) == ("file:///d", 1, chunk)
    with pytest.raises(AlreadyExistsError, match="is already a repository"):
        Catalog.make(database_url, data_url="file:///d", chunk=ChunkDefaults())
    with Catalog.open(database_url, data_url="file:///d") as found:
        assert found.repository == record
        assert [operation.kind for operation in list_operations(found)] == ["init"]
    with pytest.raises(InvalidInputError, match="keeps its data in 'file:///d', not in 's3://x'"):
        Catalog.open(database_url, data_url="s3://x")


def test_looking_for_a_repository_leaves_nothing(database_url: str, tmp_path: Path) -> None:
    with pytest.raises(
        NotFoundError, match=r"no repository at .*'dcpstore init URL --data FOLDER'"
    ):
        Catalog.open(database_url)
    with pytest.raises(NotFoundError, match="no repository at"):
        upgrade_schema(database_url)
    with pytest.raises(InvalidInputError, match="pass data="):
        Catalog.make(database_url, data_url=None)
    assert list(tmp_path.iterdir()) == []
    with Catalog.make(database_url, data_url="d"):
        pass


def test_an_empty_file_is_an_empty_database(tmp_path: Path) -> None:
    (tmp_path / "catalog.db").touch()
    url = sqlite_url(tmp_path / "catalog.db")
    with pytest.raises(NotFoundError, match="no repository at"):
        Catalog.open(url)
    Catalog.make(url, data_url="d").close()
    Catalog.open(url).close()


@pytest.mark.parametrize("name", ["a b.db", "what?x=1.db", "a#b.db", "100%25.db", "ä:@.db", "a'b"])
def test_sqlite_files_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Catalog.make(sqlite_url(name), data_url="d").close()
    assert (tmp_path / name).is_file()
    with Catalog.open(sqlite_url(tmp_path / name)) as catalog:
        assert query_rows(catalog, "SELECT count(*) AS n FROM history", {})[0].n == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_relative_path_stays_where_it_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Catalog.make("sqlite:///catalog.db", data_url="d") as catalog:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert query_rows(catalog, "SELECT count(*) AS n FROM history", {})[0].n == 0


def test_other_peoples_tables_are_refused(database_url: str) -> None:
    with writing(database_url) as connection:
        connection.execute(text("CREATE TABLE users (id int)"))
    for find in (Catalog.open, Catalog.make):
        with pytest.raises(SchemaError, match=r"is not a dcpstore catalog: .*users"):
            find(database_url, data_url="d")
    with writing(database_url) as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num text)"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('0001')"))
    with pytest.raises(SchemaError, match="is not a dcpstore catalog"):
        upgrade_schema(database_url)


def test_a_file_that_is_not_a_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    path.write_bytes(b"this is a text, and long enough to be looked at" * 100)
    for find in (Catalog.open, Catalog.make):
        with pytest.raises(SchemaError, match="is not a dcpstore catalog"):
            find(sqlite_url(path), data_url="d")
    with pytest.raises(NotFoundError, match=r"cannot open the catalog .* its folder exists"):
        Catalog.make(sqlite_url(tmp_path / "no" / "catalog.db"), data_url="d")
    with pytest.raises(NotFoundError, match="cannot open the catalog"):
        Catalog.open(sqlite_url(tmp_path))


def set_revision(url: str, revision: str) -> None:
    with writing(url) as connection:
        connection.execute(
            text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision}
        )


def test_older_and_newer_schemas_say_what_to_do(database_url: str) -> None:
    Catalog.make(database_url, data_url="d").close()
    set_revision(database_url, "0000")
    with pytest.raises(SchemaError, match=r"older dcpstore.*'dcpstore db-upgrade --repo "):
        Catalog.make(database_url, data_url="d")
    for newer in ("9999", "f00ba4"):
        set_revision(database_url, newer)
        with pytest.raises(SchemaError, match=r"newer dcpstore.*update dcpstore"):
            Catalog.open(database_url)
        with pytest.raises(SchemaError, match=r"newer dcpstore.*update dcpstore"):
            upgrade_schema(database_url)


TOMORROW = f"{int(revisions.HEAD) + 1:04}"


def be_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a dcpstore of tomorrow, with one migration more."""
    folder = tmp_path / "migrations"
    shutil.copytree(migrations_folder(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "versions" / f"{TOMORROW}_mood.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\n\n"
        f"revision = '{TOMORROW}'\ndown_revision = '{revisions.HEAD}'\n\n\n"
        "def upgrade():\n    op.add_column('version', sa.Column('mood', sa.Text()))\n"
    )
    monkeypatch.setattr(migrating_module, "migrations_folder", lambda: folder)
    monkeypatch.setattr(revisions, "HEAD", TOMORROW)


def test_upgrade_runs_what_is_missing_and_is_idempotent(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Catalog.make(database_url, data_url="d").close()
    today = revisions.HEAD
    assert upgrade_schema(database_url) == (today, today)
    be_newer(tmp_path, monkeypatch)
    with pytest.raises(SchemaError, match="older dcpstore"):
        Catalog.open(database_url)
    assert upgrade_schema(database_url) == (today, TOMORROW)
    assert upgrade_schema(database_url) == (TOMORROW, TOMORROW)
    with Catalog.open(database_url) as catalog:
        assert query_rows(catalog, "SELECT mood FROM version", {}) == []
        assert query_rows(catalog, "SELECT * FROM history", {}) == []


def test_threads_create_and_upgrade_on_both_databases_at_once(
    postgres_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 8
    with ExitStack() as stack:
        urls = [
            stack.enter_context(servers.new_database(postgres_server))
            if i % 2
            else sqlite_url(tmp_path / f"{i}.db")
            for i in range(count)
        ]
        for url in urls[::4] + urls[1::4]:  # half of each kind are there, and of today
            Catalog.make(url, data_url="d").close()
        today = revisions.HEAD
        be_newer(tmp_path, monkeypatch)
        barrier = threading.Barrier(count)

        def work(i: int) -> object:
            barrier.wait()
            if i % 4 < 2:
                return upgrade_schema(urls[i])
            with Catalog.make(urls[i], data_url="d") as made:
                return list_log(made)

        with ThreadPoolExecutor(count) as threads:
            found = list(threads.map(work, range(count)))
        assert found == [(today, TOMORROW) if i % 4 < 2 else [] for i in range(count)]
        for url in urls:
            with Catalog.open(url) as catalog:
                assert query_rows(catalog, "SELECT mood FROM version", {}) == []
                assert query_rows(catalog, "SELECT * FROM history", {}) == []
                assert [operation.kind for operation in list_operations(catalog)] == ["init"]


def test_many_threads_create_many_repositories(tmp_path: Path) -> None:
    def make(i: int) -> None:
        dcpstore.open(tmp_path / f"{i}").close()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(make, range(24)))


def test_migrating_leaves_the_process_wide_modules_of_alembic_alone(tmp_path: Path) -> None:
    def proxies() -> tuple[object, object]:
        return getattr(alembic.op, "_proxy", None), getattr(alembic.context, "_proxy", None)

    # As a program does that migrates a database of its own, perhaps in another thread.
    engine = create_engine("sqlite://")
    with engine.connect() as connection, Operations.context(MigrationContext.configure(connection)):
        before = proxies()
        Catalog.make(sqlite_url(tmp_path / "catalog.db"), data_url="d").close()
        assert proxies() == before
        alembic.op.create_table("theirs", Column("id", Integer))
        assert inspect(connection).get_table_names() == ["theirs"]
    engine.dispose()


def test_failed_creation_leaves_nothing(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The views come last: all tables are there when this fails.
    monkeypatch.setitem(VIEWS, "history", "SELECT nothing FROM version")
    with pytest.raises(Exception, match="nothing"):
        Catalog.make(database_url, data_url="d")
    database = Database(database_url)
    with database.write() as connection:
        assert inspect(connection).get_table_names() == []
    database.close()
    monkeypatch.undo()
    Catalog.make(database_url, data_url="d").close()


@pytest.mark.filterwarnings("ignore:Skipped unsupported reflection of expression-based index")
@pytest.mark.filterwarnings("ignore:autogenerate skipping metadata-specified expression-based")
def test_migrations_make_what_the_schema_says(database_url: str) -> None:
    Catalog.make(database_url, data_url="d").close()
    database = Database(database_url)
    with database.write() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, schema.tables) == []
        found = inspect(connection)
        for table in schema.tables.tables.values():
            checks = {check["name"] for check in found.get_check_constraints(table.name)}
            named = {c.name for c in table.constraints if isinstance(c, CheckConstraint)}
            assert checks == named
            indexes = {index.name for index in table.indexes}
            assert {index["name"] for index in _indexes_of(connection, table.name)} == indexes
    database.close()


def _indexes_of(connection: Connection, table: str) -> Sequence[Any]:
    """Return the indexes of a table by name, those of expressions too."""
    if connection.dialect.name != "sqlite":
        indexes = inspect(connection).get_indexes(table)
        return [one for one in indexes if "duplicates_constraint" not in one]
    query = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    found = connection.exec_driver_sql(f"{query} AND tbl_name = ?", (table,)).mappings().all()
    made = {str(CreateIndex(i).compile(connection)) for i in schema.tables.tables[table].indexes}
    quoted = {sql.replace('"', "") for sql in made}  # a keyword may be quoted, as in "plan"
    assert {row["sql"].replace('"', "") for row in found} == quoted
    return found


def test_every_foreign_key_has_an_index_that_begins_with_it() -> None:
    for table in schema.tables.tables.values():
        keys = [[c.name for c in table.primary_key.columns]]
        keys += [[c.name for c in index.columns] for index in table.indexes]
        for foreign in table.foreign_key_constraints:
            names = list(foreign.column_keys)
            if (table.name, names) == ("tensor", ["layout"]):
                continue  # layouts are never deleted
            assert any(key[: len(names)] == names for key in keys), (table.name, names)


def test_head_is_the_newest_migration_and_ids_are_counted() -> None:
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()))
    scripts = list(ScriptDirectory.from_config(config).walk_revisions())
    assert scripts[0].revision == revisions.HEAD
    assert [s.revision for s in reversed(scripts)] == [
        f"{i:04}" for i in range(1, len(scripts) + 1)
    ]


def test_opening_loads_neither_alembic_nor_torch(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "catalog.db")
    Catalog.make(url, data_url="d").close()
    code = (
        "import sys; from dcpstore.catalog.catalog import Catalog\n"
        "from dcpstore.catalog.read.log_filter import list_log\n"
        "with Catalog.open(sys.argv[1]) as c: list_log(c)\n"
        "print(sorted({'alembic', 'torch', 'zarr', 'numpy', 'psycopg'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, url], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_lost_catalog_is_never_replaced_by_an_empty_one(place: Place) -> None:
    with place.open() as repo:
        dcpstore.save({"w": torch.ones(3)}, repo)
    catalog = Path(place.data).parent / "catalog.db"
    for lose in (catalog.unlink, lambda: catalog.write_bytes(b"")):
        lose()
        for call in (place.open, lambda: dcpstore.save({"w": torch.zeros(3)}, place.data)):
            with pytest.raises(
                AlreadyExistsError, match=r"another catalog, or had one here.*dcpstore rebuild"
            ):
                call()
    report = rebuild(place.data, place.url)
    assert report.versions == (1,)
    with place.open() as repo:
        assert_sound(repo)
