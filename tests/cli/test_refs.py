"""`tag` and `branch` list without a name and make with one; what they make is in the catalog."""

import json

from tests.cli.conftest import Run, ask_database

REFS = (
    "SELECT ref.name, ref.kind, version.number FROM ref JOIN version ON version.id = ref.version"
    " ORDER BY ref.name"
)


def test_list(run: Run, target: str) -> None:
    assert run("tag", repo=target).stdout == "NAME  VERSION\nbest  v2\n"
    assert run("branch", repo=target).stdout == "NAME  VERSION\nmain  v3\n"
    assert json.loads(run("tag", "--json", repo=target).stdout) == [
        {"name": "best", "kind": "tag", "version": 2}
    ]
    assert json.loads(run("branch", "--json", repo=target).stdout) == [
        {"name": "main", "kind": "branch", "version": 3}
    ]


def test_an_empty_repository_lists_none(run: Run, empty: str) -> None:
    for command in ("tag", "branch"):
        result = run(command, repo=empty)
        assert (result.exit_code, result.stdout) == (0, "")
        assert result.stderr.startswith("no ")
        assert json.loads(run(command, "--json", repo=empty).stdout) == []


def test_make(run: Run, target: str) -> None:
    assert run("tag", "first", "v1", repo=target).stdout == "tag first is v1\n"
    assert json.loads(run("tag", "last", "--json", repo=target).stdout) == {
        "name": "last",
        "kind": "tag",
        "version": 3,
    }
    assert run("branch", "try-lr", "--at", "best", repo=target).stdout == "branch try-lr is v2\n"
    assert json.loads(run("branch", "next", "--json", repo=target).stdout)["version"] == 3
    assert ask_database(target, REFS) == [
        ("best", "tag", 2),
        ("first", "tag", 1),
        ("last", "tag", 3),
        ("main", "branch", 3),
        ("next", "branch", 3),
        ("try-lr", "branch", 2),
    ]


def test_move(run: Run, target: str) -> None:
    refused = run("tag", "best", "v1", repo=target)
    assert (refused.exit_code, refused.stdout) == (11, "")
    assert "'dcpstore tag best REF --move'" in refused.stderr
    assert run("tag", "best", "v1", "--move", repo=target).stdout == "tag best is v1\n"
    assert run("undo", repo=target).stdout == "best is v2 again\n"
    moved = run("tag", "new=1", "--move", "--json", repo=target)  # there is none, and no REF
    assert json.loads(moved.stdout) == {"name": "new=1", "kind": "tag", "version": 3}


def test_what_is_refused_changes_nothing(run: Run, target: str) -> None:
    before = ask_database(target, REFS)
    for args, code in {
        ("tag", "best", "v1"): 11,
        ("tag", "main", "v1"): 11,
        ("branch", "best"): 11,
        ("tag", "main", "v1", "--move"): 11,
        ("tag", "--move"): 2,
        ("tag", "best", "--move", "--delete"): 2,
        ("tag", "a@step=5"): 2,
        ("tag", "v7"): 2,
        ("tag", "no spaces"): 2,
        ("tag", "new", "v9"): 1,
        ("tag", "new", "bset"): 1,
        ("branch", "new", "--at", "main~7"): 1,
        ("branch", "--at", "best"): 2,
    }.items():
        result = run(*args, repo=target)
        assert (args, result.exit_code, result.stdout) == (args, code, "")
    assert ask_database(target, REFS) == before
