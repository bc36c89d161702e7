"""How commands end: exit codes, one message, quiet ends; never a traceback."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sqlalchemy import make_url

import dcpstore
from dcpstore import errors
from dcpstore.cli.session import NoRepositoryError, exit_code
from dcpstore.repository import Repository
from tests.cli.conftest import Run, ask_database, process_environment, run_process

CODES = {
    "DcpstoreError": 1,
    "NotFoundError": 1,
    "MismatchError": 1,
    "UnsafeDataError": 1,
    "InvalidInputError": 2,
    "CorruptionError": 3,
    "ConflictError": 11,
    "AlreadyExistsError": 11,
    "SchemaError": 12,
}


def test_every_error_has_its_code() -> None:
    assert {name: exit_code(getattr(errors, name)("")) for name in CODES} == CODES
    assert set(errors.__all__) - set(CODES) == {"RankFailure"}
    assert exit_code(errors.RankFailure("save", {})) == 1
    assert exit_code(NoRepositoryError("")) == 10


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("show", "best"), 0),
        (("show", "worst"), 1),
        (("show", "main~9"), 1),
        (("ls", "best", "nothing.*"), 1),
        (("show", "no ref"), 2),
        (("log", "--no-such-option"), 2),
        (("no-such-command",), 2),
        (("tag", "best"), 11),
    ],
)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_codes_and_messages_of_a_process(target: str, args: tuple[str, ...], code: int) -> None:
    result = run_process(*args, repo=target)
    assert result.returncode == code, result.stderr
    assert bool(result.stdout) == (code == 0)
    assert "Traceback" not in result.stderr
    if code not in (0, 2):
        assert result.stderr.startswith("dcpstore: ")


def test_a_json_error_follows_the_message(run: Run, target: str) -> None:
    result = run("show", "bset", "--json", repo=target)
    message, shape = result.stderr.splitlines()
    assert json.loads(shape) == {
        "error": {"kind": "not_found", "message": message.removeprefix("dcpstore: ")}
    }
    assert "'best'" in message
    absent = run("log", "--json", repo=f"{target}/no")
    assert json.loads(absent.stderr.splitlines()[-1])["error"]["kind"] == "no_repository"


@pytest.mark.parametrize(
    "args",
    [
        ("log", "--steps", "5", "--json"),
        ("log", "--json", "--no-such-option"),
        ("log", "--no-such-option", "--json"),
        ("diff", "--json"),
        ("lgo", "--json"),
        ("--no-such-option", "log", "--json"),
    ],
)
def test_wrong_usage_is_json_too(run: Run, target: str, args: tuple[str, ...]) -> None:
    text = run(*(arg for arg in args if arg != "--json"), repo=target)
    result = run(*args, repo=target)
    assert (result.exit_code, result.stdout) == (2, "")
    *lines, last = result.stderr.splitlines()
    assert lines == text.stderr.splitlines()
    error = json.loads(last)["error"]
    assert (error["kind"], lines[-1]) == ("usage", f"Error: {error['message']}")


def test_no_repository_named_is_json_too(run: Run) -> None:
    last = run("log", "--json").stderr.splitlines()[-1]
    assert json.loads(last)["error"]["kind"] == "usage"
    # what follows -- is no option
    assert not run("lgo", "--", "--json").stderr.endswith("}\n")


def test_the_shell_is_told_options_only(run: Run, target: str) -> None:
    for args, expected in {
        ("expire",): "such as --keep-last 5.",
        ("gc", "--grace", "soon"): "write '90s', '30m', '24h', '7d' or '2w'.",
        ("verify", "--resume"): "resume works only with --deep; pass that too.",
    }.items():
        result = run(*args, "--json", repo=target)
        message, last = result.stderr.splitlines()
        assert (result.exit_code, message.endswith(expected)) == (2, True), message
        assert json.loads(last)["error"]["message"].endswith(expected)


def test_no_repository_named(run: Run) -> None:
    for args in (("log",), ("db-upgrade",), ("--repo", "", "log")):
        result = run(*args)
        assert result.exit_code == 2
        assert "--repo" in result.stderr
        assert "DCPSTORE_REPO" in result.stderr


def test_the_repository_is_named_in_three_ways(run: Run, target: str) -> None:
    for args in (("--repo", target, "tag"), ("tag", "--repo", target)):
        assert "best" in run(*args).stdout
        assert "best" in run(*args, repo="/no/repository").stdout
    assert "best" in run("tag", repo=target).stdout
    assert run("--repo", target, "tag", "--repo", "/no/repository").exit_code == 10


@pytest.mark.parametrize("command", ["log", "show", "init", "db-upgrade"])
def test_a_path_that_is_no_text_is_a_message(command: str, tmp_path: Path) -> None:
    path = os.path.join(tmp_path, os.fsdecode(b"\x80"))
    args = ["init", path] if command == "init" else ["--repo", path, command]
    result = run_process(*args)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("dcpstore: the repository is ")
    assert len(result.stderr.splitlines()) == 1


def test_no_server_is_no_repository_and_no_password_is_shown(run: Run) -> None:
    result = run("log", repo="postgresql://ada:s3cret@127.0.0.1:1/db")
    assert (result.exit_code, result.stdout) == (10, "")
    assert "s3cret" not in result.output


def test_a_database_that_is_not_ours(run: Run, database_url: str) -> None:
    ask_database(database_url, "CREATE TABLE cats (name text)")
    for args in (("log",), ("db-upgrade",)):
        assert run(*args, repo=database_url).exit_code == 12
    assert run("init", database_url, "--data", "unused").exit_code == 12
    assert not Path("unused").exists()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_damaged_catalog(run: Run, target: str, tmp_path: Path) -> None:
    ask_database(target, "PRAGMA wal_checkpoint(TRUNCATE)")
    path = tmp_path / "catalog.db"
    size = path.stat().st_size
    with path.open("r+b") as file:  # all but the page of the schema
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    result = run("log", repo=target)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "is damaged" in result.stderr


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    "change",
    ["UPDATE metric SET value = 'abc'", "UPDATE ref SET name = x'00ff' WHERE kind = 'tag'"],
)
def test_a_damaged_name_or_number_is_damage(run: Run, target: str, change: str) -> None:
    ask_database(target, change)
    for args in (("log", "--json"), ("show", "v2"), ("verify",), ("ls", "v2")):
        result = run(*args, repo=target)
        assert (result.exit_code, "is damaged" in result.output) == (3, True), (args, result.output)


@pytest.mark.parametrize(
    "args",
    [
        ("init", "new", "--data", ""),
        ("import", ""),
        ("export", "v1", "", "--format", "torch"),
        ("rebuild", "", "--into", "new"),
        ("export", "v1", "new", "--format", "safetensors", "--max-shard-size", ""),
        ("sql", "SELECT :a", "-p", "a=1", "-p", "a=2"),
        ("expire", "--keep-best", f"val_loss:{'9' * 5000}"),
        ("expire", "--keep-best", "val_loss:\uff19"),
        ("diff", "v1", "v2", "--plot", "missing/x.png"),
    ],
)
def test_what_an_unset_variable_or_a_slip_leaves_is_refused(
    run: Run, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    result = run(*args, repo=target)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert [*(tmp_path / "empty").iterdir()] == []


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("lgo", "'log'"), ("LOG", "'log'"), ("forgot", "'forget'"), ("tags", "'tag'")],
)
def test_a_command_that_is_misspelled_is_offered(run: Run, typed: str, meant: str) -> None:
    result = run(typed, repo="none")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"no command {typed!r}. Did you mean {meant}" in result.stderr
    assert "No such command 'xyzzy'" in run("xyzzy").stderr


def test_a_lost_catalog_is_to_be_rebuilt_not_made_new(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "ckpts"
    assert "'dcpstore init'" in run("log", repo=str(folder)).stderr
    run("init", str(folder))
    for file in folder.glob("catalog.db*"):
        file.unlink()
    result = run("log", repo=str(folder))
    assert result.exit_code == 10
    assert f"'dcpstore rebuild {folder} --into {folder}'" in result.stderr
    assert run("rebuild", str(folder), "--into", str(folder)).exit_code == 0
    assert run("log", repo=str(folder)).exit_code == 0


def test_no_repository_is_named_as_it_was_given(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for args in (("log",), ("doctor",)):
        assert "no repository at nowhere." in run(*args, repo="nowhere").output
    assert not (tmp_path / "nowhere").exists()
    result = run("rebuild", "nowhere", "--into", "x")
    assert (result.exit_code, "there is no data folder" in result.stderr) == (10, True)
    assert f"'{tmp_path}/nowhere'; give the folder that holds packs/" in result.stderr


def test_a_server_without_a_repository_names_how_to_make_one(run: Run, database_url: str) -> None:
    result = run("log", repo=database_url)
    assert (result.exit_code, "'dcpstore init URL --data FOLDER'" in result.stderr) == (10, True)


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_database_that_the_server_lacks(run: Run, database_url: str) -> None:
    name = make_url(database_url).database
    result = run("log", repo=database_url.replace(f"/{name}", "/nodb"))
    assert (result.exit_code, "'createdb nodb'" in result.stderr) == (10, True), result.stderr


def overwritten(file: Path) -> None:
    file.write_text("a text, and no database " * 1000)


def truncated(file: Path) -> None:
    os.truncate(file, 20_000)


@pytest.mark.parametrize("spoil", [overwritten, truncated])
def test_a_broken_catalog_beside_its_data_is_moved_away_and_rebuilt(
    run: Run, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    folder = tmp_path / "b1"
    dcpstore.save({"w": torch.ones(3)}, folder)
    file = folder / "catalog.db"
    ask_database(f"sqlite:///{file}", "PRAGMA wal_checkpoint(TRUNCATE)")
    spoil(file)
    for beside in ("catalog.db-wal", "catalog.db-shm"):
        (folder / beside).unlink(missing_ok=True)
    cure = (
        f"Move catalog.db away ('mv {folder}/catalog.db {folder}/catalog.db.broken', also "
        "catalog.db-wal and catalog.db-shm if they exist), then "
        f"'dcpstore rebuild {folder} --into {folder}'."
    )
    again = ("rebuild", str(folder), "--into", str(folder))
    for args in (("log",), ("verify",), again):
        result = run(*args, repo=str(folder))
        assert result.exit_code in (3, 12)
        assert cure in result.stderr
    if spoil is overwritten:
        assert f"catalog.db in '{folder}' is not a database" in result.stderr
    examined = json.loads(run("doctor", "--json", repo=str(folder)).stdout)
    (database,) = (one for one in examined if one["check"] in ("database", "schema"))
    assert (database["check"], database["status"]) == ("database", "problem")
    assert cure in database["advice"]
    file.rename(folder / "catalog.db.broken")
    assert run(*again).exit_code == 0
    assert "v1" in run("log", repo=str(folder)).stdout


def test_an_empty_catalog_beside_its_data_is_a_lost_one(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "b3"
    run("init", str(folder))
    for file in folder.glob("catalog.db*"):
        file.unlink()
    (folder / "catalog.db").touch()
    rebuild = f"'dcpstore rebuild {folder} --into {folder}'"
    for args in (("log",), ("doctor",)):
        assert rebuild in run(*args, repo=str(folder)).output
    assert run("rebuild", str(folder), "--into", str(folder)).exit_code == 0
    assert run("log", repo=str(folder)).exit_code == 0


def test_a_missing_data_folder(run: Run, target: str, tmp_path: Path) -> None:
    (tmp_path / "data").rename(tmp_path / "moved")
    result = run("log", repo=target)
    assert result.exit_code == 10
    assert str(tmp_path / "data") in result.stderr


def test_an_error_of_the_system_is_a_message(
    run: Run, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", "catalog\x1b.db")

    monkeypatch.setattr(Repository, "log", fail)
    result = run("log", "main", repo=target)
    assert result.exit_code == 1
    assert result.stderr == "dcpstore: [Errno 13] Permission denied: 'catalog\\x1b.db'\n"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_closed_pipe_is_quiet(target: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = run_process(
        "log", repo=target, capture_output=False, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize("moment", ["import", "command", "query"])
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_an_interrupt_is_one_line(target: str, moment: str) -> None:
    interrupt = "os.kill(os.getpid(), signal.SIGINT); time.sleep(30)"
    script = {
        "import": f"""
class Slow:
    def find_spec(self, *args):
        {interrupt}
sys.meta_path.insert(0, Slow())
main()
""",
        "command": f"""
class Keyboard:
    def read(self):
        {interrupt}
sys.stdin = Keyboard()
sys.argv = ["dcpstore", "sql", "-"]
main()
""",
        "query": """
import threading
class Keyboard:
    def read(self):
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        return "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT 1 FROM n) SELECT max(i) FROM n"
sys.stdin = Keyboard()
sys.argv = ["dcpstore", "sql", "-"]
main()
""",
    }[moment]
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import os, signal, sys, time\nfrom dcpstore.cli import main\n{script}",
        ],
        env=process_environment(target),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("asked", [("log",), ("--help",), ("--version",)])
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_full_device_is_a_message(target: str, asked: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = run_process(
            *asked, repo=target, capture_output=False, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 1
    assert done.stderr == "dcpstore: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_closed_streams_lead_nowhere(target: str, closed: str) -> None:
    command = f"exec {shlex.quote(sys.executable)} -m dcpstore log {closed}"
    done = subprocess.run(
        ["sh", "-c", command],
        env=process_environment(target),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ("v3" in done.stdout) == (closed == "2>&-")
