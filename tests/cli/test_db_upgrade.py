"""`db-upgrade` says what it did; other commands say when it is needed."""

import json
import re
import tarfile
from dataclasses import fields
from pathlib import Path

from dcpstore.catalog.schema.revisions import HEAD
from dcpstore.records import UpgradePlan
from tests.cli.conftest import Run, ask_database

OLD = Path(__file__).parents[1] / "kept" / "0001" / "sqlite.tar.gz"


def test_a_catalog_of_today_stays(run: Run, target: str) -> None:
    result = run("db-upgrade", repo=target)
    assert (result.exit_code, result.stdout) == (0, f"the schema is {HEAD} already\n")
    before_and_after = {"before": HEAD, "after": HEAD}
    assert json.loads(run("db-upgrade", "--json", repo=target).stdout) == before_and_after
    result = run("db-upgrade", "--dry-run", repo=target)
    assert (result.exit_code, result.stdout) == (0, f"the schema is {HEAD} already\n")


def test_an_upgrade_says_from_which_schema_to_which(run: Run, tmp_path: Path) -> None:
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    result = run("db-upgrade", repo=str(tmp_path))
    assert (result.exit_code, result.stdout) == (0, f"upgraded the schema 0001 -> {HEAD}\n")
    assert run("log", repo=str(tmp_path)).exit_code == 0


def test_a_dry_run_says_what_would_be_done(run: Run, tmp_path: Path) -> None:
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    catalog = (tmp_path / "catalog.db").read_bytes()
    result = run("db-upgrade", "--dry-run", repo=str(tmp_path))
    assert result.exit_code == 0
    said, converted, made = result.stdout.splitlines()
    assert said == f"would upgrade the schema 0001 -> {HEAD}"
    assert converted == "to convert: 6 versions, 46 entries, 18 tensors, 24 chunks"
    assert re.fullmatch(
        r"makes about \d+ rows, [\d.]+ KiB; takes about \d+ s, estimated from the newest versions",
        made,
    )
    plan = json.loads(run("db-upgrade", "--dry-run", "--json", repo=str(tmp_path)).stdout)
    assert (plan["before"], plan["after"], plan["entries"]) == ("0001", HEAD, 46)
    assert plan.keys() == {field.name for field in fields(UpgradePlan)}
    assert (tmp_path / "catalog.db").read_bytes() == catalog


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
