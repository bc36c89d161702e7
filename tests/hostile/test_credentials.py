"""A password is shown to nobody: no message, log, repr, catalog, journal or manifest has it."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Any

import psycopg
import pytest
import torch
from click.testing import CliRunner

import dcpstore
from dcpstore.cli.app import commands
from dcpstore.errors import DcpstoreError, InvalidInputError
from dcpstore.maintenance.rebuild import rebuild

SECRET = "s3cr3t:p%40ss"
DOWN = [
    f"postgresql://ada:{SECRET}@127.0.0.1:1/db",
    f"postgresql+psycopg://ada@127.0.0.1:1/db?password={SECRET}",
    f"postgresql://ada:{SECRET}@127.0.0.1:x/db",
    f"postgresql://ada:{SECRET}@/db?host=127.0.0.1&port=1",
    f"postgresql://ada:{SECRET}@127.0.0.1:1/db?nonsense={SECRET}",
    f"mysql://ada:{SECRET}@127.0.0.1:1/db",
    f"sqlite://ada:{SECRET}@host/db",
]
DATA = [
    f"s3://ada:{SECRET}@bucket/prefix",
    f"s3://bucket/prefix?X-Amz-Signature={SECRET}",
    f"az://account/container?sig={SECRET}",
    f"https://ada:{SECRET}@host/x",
    f"file://ada:{SECRET}@localhost/x",
    f"s3://bucket/prefix#{SECRET}",
]


def message_of(error: BaseException) -> str:
    """Return all that a traceback prints of an error, with those that caused it."""
    return "".join(traceback.format_exception(error))


def assert_hidden(text: str) -> None:
    # the URL's own spelling, and the password that it means
    assert "s3cr3t" not in text, text


def calls(url: str, folder: Path) -> dict[str, Any]:
    """Return what takes a URL of a repository, by name."""
    state = {"w": torch.ones(1)}
    return {
        "open": lambda: dcpstore.open(url, create=False),
        "make": lambda: dcpstore.open(url, data=folder / "data"),
        "save": lambda: dcpstore.save(state, url),
        "load": lambda: dcpstore.load(state, url),
        "twice": lambda: dcpstore.save(state, url, checkpoint_id=url),
        "rebuild": lambda: rebuild(folder, url),
    }


@pytest.mark.parametrize("url", DOWN, ids=range(len(DOWN)))
def test_a_server_that_does_not_answer_is_named_without_it(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with dcpstore.open(tmp_path / "sound") as repo:
        dcpstore.save({"w": torch.ones(1)}, repo)
    sound = str(tmp_path / "sound")
    for name, call in calls(url, tmp_path / "sound").items():
        with pytest.raises(DcpstoreError) as caught:
            call()
        assert_hidden(str(caught.value))
        assert_hidden("".join(traceback.format_exception_only(caught.value))), name
    for args in (
        ["log", "--repo", url],
        ["init", url, "--data", "x"],
        ["copy", sound, url],
        ["db-upgrade", "--repo", url],
        ["rebuild", sound, "--into", url],
    ):
        done = CliRunner().invoke(commands, [*args, "--json"])
        assert done.exit_code not in (0, None)
        assert_hidden(done.stdout + done.stderr)
    assert_hidden(caplog.text)


@pytest.mark.parametrize("data", DATA, ids=range(len(DATA)))
def test_a_data_url_with_credentials_is_refused_before_it_is_kept(
    data: str, tmp_path: Path
) -> None:
    for call in (
        lambda: dcpstore.open(tmp_path / "repo", data=data),
        lambda: dcpstore.open(f"sqlite:///{tmp_path}/catalog.db", data=data),
        lambda: rebuild(data, tmp_path / "repo"),
    ):
        with pytest.raises(InvalidInputError, match="environment") as caught:
            call()
        assert_hidden(message_of(caught.value))
    done = CliRunner().invoke(commands, ["init", str(tmp_path / "repo"), "--data", data, "--json"])
    assert done.exit_code == 2
    assert_hidden(done.stdout + done.stderr)
    assert not (tmp_path / "repo").exists()
    assert not (tmp_path / "catalog.db").exists()


def test_a_password_stays_out_of_all_that_a_repository_keeps_and_says(
    postgres_server: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with psycopg.connect(postgres_server.get_uri(), autocommit=True) as admin:
        admin.execute("CREATE ROLE hostile LOGIN SUPERUSER PASSWORD 's3cr3t'")
        admin.execute("CREATE DATABASE credentials OWNER hostile")
    try:
        base = postgres_server.get_uri("credentials")
        host = base.rpartition("@")[2]
        url = f"postgresql://hostile:s3cr3t@{host}"
        with dcpstore.open(url, data=tmp_path / "data") as repo:
            dcpstore.save({"w": torch.ones(1)}, repo, tags=["t"], labels={"a": "b"})
            assert_hidden(repr(repo) + repr(repo.catalog) + str(repo.about))
            for wrong in ("SELECT nothing", "DELETE FROM version", "SELECT * FROM histroy"):
                with pytest.raises(DcpstoreError) as caught:
                    repo.sql(wrong)
                assert_hidden(message_of(caught.value))
            with pytest.raises(DcpstoreError) as caught:
                repo.tag("t")
            assert_hidden(message_of(caught.value))
            tables = repo.sql("SELECT tablename AS name FROM pg_tables WHERE schemaname = 'public'")
            for table in tables:
                assert_hidden(repr(repo.sql(f'SELECT * FROM "{table.name}"')))
        for args in (["log"], ["show"], ["sql", "SELECT * FROM operations"], ["verify"], ["gc"]):
            done = CliRunner().invoke(commands, [args[0], "--repo", url, "--json", *args[1:]])
            assert done.exit_code == 0
            assert_hidden(done.stdout + done.stderr)
        done = CliRunner().invoke(commands, ["init", url, "--data", "x"])
        assert_hidden(done.stdout + done.stderr)
        for file in (path for path in (tmp_path / "data").rglob("*") if path.is_file()):
            assert b"s3cr3t" not in file.read_bytes()
    finally:
        with psycopg.connect(postgres_server.get_uri(), autocommit=True) as admin:
            admin.execute("DROP DATABASE credentials WITH (FORCE)")
            admin.execute("DROP ROLE hostile")
    assert_hidden(caplog.text)
