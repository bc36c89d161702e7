"""`doctor` finds what is wrong with a set-up: each fault here is a real one."""

import json
import re
import sqlite3
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import psycopg
import pytest

from dcpstore import repository
from dcpstore.catalog.catalog import Catalog
from dcpstore.cli.doctor import file_system, is_locked_elsewhere
from tests.cli.conftest import Run, ask_database, process_environment
from tests.cli.history import save_example
from tests.cli.test_db_upgrade import OLD
from tests.servers import own_server

SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
POSTGRES = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)


def examined(run: Run, target: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Return the exit code, and the status and text of each check."""
    result = run("doctor", "--json", repo=target)
    findings = json.loads(result.stdout)
    assert len({one["check"] for one in findings}) == len(findings)
    return result.exit_code, {
        one["check"]: (one["status"], f"{one['found']} {one['advice']}") for one in findings
    }


def only_problem(run: Run, target: str) -> tuple[str, str]:
    """Return the one check with a problem, and what it says; the exit code is 1."""
    code, found = examined(run, target)
    assert code == 1
    (problem,) = ((check, text) for check, (status, text) in found.items() if status == "problem")
    return problem


def test_a_good_set_up_has_no_problem(run: Run, target: str, tmp_path: Path) -> None:
    code, found = examined(run, target)
    assert (code, {status for status, _ in found.values()} - {"warning"}) == (0, {"ok"})
    database, clock = found["database"][1], found["clock"][1]
    if target.startswith("sqlite"):
        assert "SQLite 3." in database
        assert "this machine" in clock
        assert "a second process waits" in found["locks"][1]
    else:
        assert "Postgres 1" in database
        assert re.match(r"0\.\d s (behind|ahead of) the database server", clock)
        assert "locks" not in found
    assert found["torch"][1].startswith("2.")
    assert "free; v3 has 4.0 MiB" in found["space"][1]
    left = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert not [path for path in left if "doctor" in str(path)]
    text = run("doctor", "-r", target).stdout
    assert re.search(r"^ok +data +write, read, list and delete work in ", text, re.MULTILINE)


def test_without_a_repository_only_the_installation_is_checked(run: Run) -> None:
    result = run("doctor")
    assert result.exit_code == 0
    assert "database" not in result.stdout.split("no repository is named")[0]
    assert "pass --repo" in result.stdout


@SQLITE
def test_no_repository_there(run: Run, target: str, tmp_path: Path) -> None:
    check, text = only_problem(run, str(tmp_path / "missing"))
    assert (check, "'dcpstore init'" in text) == ("database", True)
    ask_database(target, "PRAGMA wal_checkpoint(TRUNCATE)")
    for file in tmp_path.glob("catalog.db*"):
        file.unlink()
    assert only_problem(run, target)[0] == "database"


def test_a_lost_catalog_names_rebuild(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "ckpts"
    run("init", str(folder))
    for file in folder.glob("catalog.db*"):
        file.unlink()
    check, text = only_problem(run, str(folder))
    assert (check, "'dcpstore rebuild " in text) == ("database", True)


def test_no_server_at_an_address(run: Run) -> None:
    check, text = only_problem(run, "postgresql://ada:s3cret@127.0.0.1:1/db")
    assert (check, "the server is running" in text, "s3cret" in text) == ("database", True, False)


def test_a_server_that_is_stopped(run: Run) -> None:
    with own_server() as server:
        url = server.get_uri().replace("postgres:@", "postgres:s3cret@")
        server.stop("fast")
        check, text = only_problem(run, url)
    assert (check, "the server is running" in text, "s3cret" in text) == ("database", True, False)


@POSTGRES
def test_a_database_that_may_only_be_read(run: Run, target: str, catalog: Catalog) -> None:
    with psycopg.connect(target, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    check, text = only_problem(run, target)
    assert (check, "read-only" in text) == ("database", True)


@POSTGRES
@pytest.mark.parametrize(("off", "status"), [("20 s", "warning"), ("-1 hour", "problem")])
def test_a_server_whose_clock_is_wrong(run: Run, target: str, off: str, status: str) -> None:
    with psycopg.connect(target, autocommit=True) as connection:
        connection.execute(
            "CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS "
            f"$$ SELECT pg_catalog.clock_timestamp() + interval '{off}' $$"
        )
        name = connection.info.dbname
        connection.execute(f'ALTER DATABASE "{name}" SET search_path = public, pg_catalog')
    code, found = examined(run, target)
    assert (code, found["clock"][0]) == (int(status == "problem"), status)
    assert "NTP" in found["clock"][1]
    assert ("ahead of" in found["clock"][1]) == (off[0] == "-")


def test_a_schema_that_is_old(run: Run, tmp_path: Path) -> None:
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    check, text = only_problem(run, str(tmp_path))
    assert (check, "'dcpstore db-upgrade --repo " in text) == ("schema", True)
    assert run("db-upgrade", repo=str(tmp_path)).exit_code == 0
    assert examined(run, str(tmp_path))[0] == 0


@pytest.mark.parametrize("fault", ["missing", "a file", "not writable"])
def test_a_data_folder_that_cannot_be_used(
    run: Run, target: str, tmp_path: Path, fault: str
) -> None:
    data = tmp_path / "data"
    if fault == "not writable":  # a file in the place of a folder stops root, too
        (data / "packs").write_text("")
    else:
        data.rename(tmp_path / "moved")
        if fault == "a file":
            data.write_text("")
    check, text = only_problem(run, target)
    assert (check, str(data) in text) == ("data", True)
    if fault == "not writable":
        assert "at the first write" in text
        assert "mode and mount" in text


@SQLITE
def test_a_disk_that_is_too_small_for_the_next_version(run: Run, target: str) -> None:
    ask_database(target, f"UPDATE version SET nbytes = {1 << 60} WHERE number = 3")
    code, found = examined(run, target)
    assert (code, found["space"][0]) == (0, "warning")
    assert "v3 has 1.0 EiB" in found["space"][1]
    assert "'dcpstore expire'" in found["space"][1]


@POSTGRES
def test_a_library_that_is_missing(target: str) -> None:
    code = (
        "import sys; sys.modules.update(psycopg=None, obstore=None)\n"
        "from dcpstore.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor"],
        env=process_environment(target),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    assert re.search(r"^ok +obstore +not installed; only data in an object", done.stdout, re.M)
    assert re.search(r"^problem +database +.*pip install 'psycopg", done.stdout, re.M)


@SQLITE
def test_locks_that_do_not_reach_other_processes(
    run: Run, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_locked_elsewhere(tmp_path / "catalog.db")
    other = tmp_path / "other.db"

    def lock_another(file: Path, *, mode: str, timeout: float) -> sqlite3.Connection:
        return sqlite3.connect(other, isolation_level=None)

    monkeypatch.setattr("dcpstore.cli.doctor.open_file", lock_another)
    check, text = only_problem(run, target)
    assert (check, "two processes at once" in text) == ("locks", True)


def test_the_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    (tmp_path / "a b" / "deep").mkdir(parents=True)
    real = str(tmp_path.resolve())
    mounts = tmp_path / "mountinfo"
    spaced = real.replace(" ", r"\040") + r"/a\040b"
    mounts.write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"40 22 0:40 / {real} rw shared:7 master:1 - tmpfs tmpfs rw\n"
        f"41 40 0:41 / {spaced} rw - xfs /dev/sdb rw\n"
        f"42 40 0:42 /export {spaced} rw - nfs4 server:/export rw\n"
        "broken line\n"
    )
    assert file_system(tmp_path / "a b" / "deep", mounts) == "nfs4"
    assert file_system(tmp_path, mounts) == "tmpfs"
    assert file_system(Path("/"), mounts) == "ext4"
    assert file_system(tmp_path, tmp_path / "none") == ""


@SQLITE
def test_a_catalog_on_a_network_file_system_is_a_warning(
    run: Run, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcpstore.cli.doctor.file_system", lambda folder, mounts: "nfs4")
    code, found = examined(run, target)
    assert (code, found["locks"][0], "Postgres" in found["locks"][1]) == (0, "warning", True)


class Bucket(BaseHTTPRequestHandler):
    """As much of S3 as one probe needs; `refused` methods answer with 403."""

    objects: dict[str, bytes]
    refused: set[str]

    def handle_any(self) -> None:
        """Answer a request for an object or a list."""
        url = urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        key = unquote(url.path).removeprefix("/bucket").lstrip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = "LIST" if "list-type" in query else self.command
        if asked == "POST" and "delete" in query:
            asked = "DELETE"
            key = (re.findall(r"<Key>(.*?)</Key>", body.decode()) or [key])[0]
        if asked in self.refused:
            self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        elif asked == "PUT":
            self.objects[key] = body
            self.answer(200)
        elif asked == "DELETE":
            self.objects.pop(key, None)
            gone = f"<DeleteResult><Deleted><Key>{key}</Key></Deleted></DeleteResult>"
            self.answer(200, gone.encode())
        elif asked == "LIST":
            prefix = query.get("prefix", [""])[0]
            found = "".join(
                f"<Contents><Key>{name}</Key><Size>{len(data)}</Size>"
                "<LastModified>2026-03-01T00:00:00.000Z</LastModified></Contents>"
                for name, data in sorted(self.objects.items())
                if name.startswith(prefix)
            )
            listing = (
                f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
            )
            self.answer(200, listing.encode())
        elif key in self.objects:
            self.answer(200, self.objects[key])
        else:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    do_GET = do_PUT = do_DELETE = do_POST = do_HEAD = handle_any  # noqa: N815

    def answer(self, code: int, body: bytes = b"") -> None:
        """Send an answer."""
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Sun, 01 Mar 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextmanager
def bucket(refused: set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the address of an S3 server, and what it holds."""
    handler = type("OneBucket", (Bucket,), {"objects": {}, "refused": refused})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.objects  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("refused", ["", "PUT", "GET", "LIST", "DELETE"])
def test_the_rights_of_an_object_store(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    rights = set()
    with bucket(rights) as (address, objects):
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "ada",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "eu-west-1",
            "AWS_ALLOW_HTTP": "true",
        }.items():
            monkeypatch.setenv(name, value)
        target = str(tmp_path / "ckpts")
        with repository.open(target, data="s3://bucket/ckpts") as repo:
            save_example(repo.catalog)
        before = set(objects)
        rights.add(refused)
        if refused:
            check, text = only_problem(run, target)
            assert check == "data"
            steps = {
                "PUT": "at the first write",
                "GET": "write worked",
                "LIST": "write, read worked",
            }
            assert steps.get(refused, "write, read, list worked") in text
            assert "the rights of the key" in text
        else:
            code, found = examined(run, target)
            assert (code, found["data"][0]) == (0, "ok")
            assert "space" not in found
        left = {key for key in objects if key not in before}
        assert bool(left) == (refused == "DELETE")
