"""`db-upgrade` says what it did; other commands say when it is needed."""

import json
import tarfile
from pathlib import Path

from dcpstore.catalog.schema.revisions import HEAD
from tests.cli.conftest import Run, ask_database

OLD = Path(__file__).parents[1] / "kept" / "0001" / "sqlite.tar.gz"


def test_a_catalog_of_today_stays(run: Run, target: str) -> None:
    result = run("db-upgrade", repo=target)
    assert (result.exit_code, result.stdout) == (0, "the schema is 0002 already\n")
    assert json.loads(run("db-upgrade", "--json", repo=target).stdout) == {
        "before": "0002",
        "after": "0002",
    }


def test_an_upgrade_says_from_which_schema_to_which(run: Run, tmp_path: Path) -> None:
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    result = run("db-upgrade", repo=str(tmp_path))
    assert (result.exit_code, result.stdout) == (0, f"upgraded the schema 0001 -> {HEAD}\n")
    assert run("log", repo=str(tmp_path)).exit_code == 0


def test_an_older_catalog_is_refused_with_the_cure(run: Run, target: str) -> None:
    ask_database(target, "UPDATE alembic_version SET version_num = '0000'")
    result = run("log", repo=target)
    assert (result.exit_code, result.stdout) == (12, "")
    assert "'dcpstore db-upgrade --repo " in result.stderr


def test_a_newer_catalog_is_left_alone(run: Run, target: str) -> None:
    ask_database(target, "UPDATE alembic_version SET version_num = '9999'")
    for command in ("log", "db-upgrade"):
        result = run(command, repo=target)
        assert (result.exit_code, result.stdout) == (12, "")
        assert "update dcpstore" in result.stderr
    assert ask_database(target, "SELECT version_num FROM alembic_version") == [("9999",)]


def test_an_older_catalog_that_nobody_made_is_left_alone(run: Run, target: str) -> None:
    ask_database(target, "UPDATE alembic_version SET version_num = '0000'")
    result = run("db-upgrade", repo=target)
    assert (result.exit_code, result.stdout) == (12, "")
    assert "cannot be upgraded" in result.stderr
    assert ask_database(target, "SELECT version_num FROM alembic_version") == [("0000",)]
