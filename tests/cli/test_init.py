"""`init` makes repositories, and nothing else does."""

import json
from pathlib import Path

import click
import pytest

from dcpstore import repository
from dcpstore.cli import repositories
from dcpstore.cli.app import commands
from dcpstore.cli.repositories import init
from dcpstore.encoding.codecs import CODECS
from tests.cli.conftest import Run


def test_makes_a_folder(run: Run, tmp_path: Path) -> None:
    target = str(tmp_path / "new" / "ckpts")
    result = run("init", target)
    assert result.exit_code == 0, result.output
    with repository.open(target, create=False) as repo:
        assert repo.about.uid in result.stdout
        assert (repo.about.chunk.nbytes, repo.about.chunk.codec) == (8 << 20, "auto")
    assert run("log", "--repo", target).exit_code == 0


def test_takes_where_and_how(run: Run, database_url: str, tmp_path: Path) -> None:
    args = ("--data", str(tmp_path / "bytes"), "--chunk-mib", "2", "--codec", "zstd", "--json")
    about = json.loads(run("init", database_url, *args).stdout)
    assert list(about) == ["uid", "format_version", "data_url", "chunk", "created_at"]
    assert about["chunk"] == {"nbytes": 2 << 20, "codec": "zstd"}
    assert about["data_url"] == str(tmp_path / "bytes")
    with repository.open(database_url, create=False) as repo:
        assert repo.about.uid == about["uid"]


def test_refuses_an_existing_repository(run: Run, target: str, tmp_path: Path) -> None:
    for more in ((), ("--data", str(tmp_path / "data")), ("--data", str(tmp_path / "other"))):
        result = run("init", target, *more)
        assert (result.exit_code, result.stdout) == (11, "")
        assert "is already a repository" in result.stderr
    assert not (tmp_path / "other").exists()


def test_of_two_at_once_one_is_refused(
    run: Run, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second looks before the first has made it, and comes to make it afterwards."""
    data = str(tmp_path / "data")

    def look(target: str) -> None:
        repository.make(target, data=data, chunk=None).close()

    monkeypatch.setattr(repositories, "_refuse_existing", look)
    result = run("init", database_url, "--data", data)
    assert (result.exit_code, result.stdout) == (11, "")
    assert "is already a repository" in result.stderr


def test_no_server_leaves_no_data_folder(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    result = run("init", "postgresql://ada@127.0.0.1:1/db", "--data", str(data))
    assert result.exit_code == 10
    assert not data.exists()


def test_no_data_folder_leaves_no_catalog(run: Run, database_url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert run("init", database_url, "--data", str(tmp_path / "file" / "data")).exit_code == 1
    result = run("log", repo=database_url)
    assert result.exit_code == 10
    assert "no repository" in result.stderr


def test_a_url_needs_a_place_for_the_data(run: Run, database_url: str) -> None:
    result = run("init", database_url)
    assert result.exit_code == 2
    assert "--data" in result.stderr
    assert run("log", repo=database_url).exit_code == 10


@pytest.mark.parametrize("url", ["s3://bucket/ckpts", "gs://bucket", "az://account/container"])
def test_an_object_store_holds_no_catalog(run: Run, url: str, tmp_path: Path) -> None:
    for more in ((), ("--data", url), ("--data", str(tmp_path / "data"))):
        result = run("init", url, *more)
        assert result.exit_code == 2
        assert "'dcpstore init PATH_OR_URL --data URL'" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [("--chunk-mib", "0"), ("--codec", "gzip"), ()])
def test_what_it_refuses_leaves_nothing(run: Run, tmp_path: Path, args: tuple[str, ...]) -> None:
    target = (str(tmp_path / "new"),) if args else ()
    assert run("init", *target, *args).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_the_codecs_are_those_that_there_are() -> None:
    (option,) = (param for param in init.params if param.name == "codec")
    assert isinstance(option.type, click.Choice)
    assert tuple(option.type.choices) == ("auto", *CODECS)


NEEDED = {
    "sql": ["SELECT 1"],
    "diff": ["v1"],
    "rollback": ["v1"],
    "export": ["v1", "out", "--format", "zarr"],
    "expire": ["--keep-last", "1"],
    "forget": ["v1"],
    "best": ["val_loss"],
    "metric": ["v1", "acc=1"],
    "label": ["v1", "a=b"],
    "completion": ["bash"],
}
MAY_MAKE = {"init", "import", "rebuild", "copy"}  # what they fill may be new


def test_no_other_command_makes_one(run: Run, tmp_path: Path) -> None:
    for name in commands.list_commands(click.Context(commands)):
        if name not in MAY_MAKE:
            result = run(name, *NEEDED.get(name, ()), repo=str(tmp_path / "no"))
            code = {"completion": 0, "doctor": 1}.get(name, 10)  # which need none, or report it
            assert (name, result.exit_code) == (name, code)
    assert list(tmp_path.iterdir()) == []
