"""`rollback`, `undo`, `ops` and the deletion of names: what they print, and how they fail."""

import json

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.write.annotations import add_metrics
from dcpstore.catalog.write.refs import delete_ref
from tests.cli.conftest import Run, ask_database
from tests.cli.history import save_version

REFS = (
    "SELECT ref.name, version.number FROM ref JOIN version ON version.id = ref.version"
    " ORDER BY ref.name"
)


def test_back_and_forth(run: Run, target: str) -> None:
    assert run("rollback", "best", repo=target).stdout == "branch main is v2\n"
    assert run("tag", "-d", "best", repo=target).stdout == "deleted the tag best; it was v2\n"
    assert ask_database(target, REFS) == [("main", 2)]
    assert run("undo", repo=target).stdout == "best is v2 again\n"
    undone = json.loads(run("undo", "--json", repo=target).stdout)
    assert (undone["kind"], undone["target"], undone["old"], undone["new"]) == (
        "undo",
        "main",
        2,
        3,
    )
    assert run("undo", repo=target).stdout == "main is v2 again\n"  # the save of v3
    assert run("undo", repo=target).stdout == "main is v1 again\n"
    assert run("undo", repo=target).stdout == "main is gone; it was v1\n"
    assert run("undo", repo=target).exit_code == 2
    assert ask_database(target, REFS) == []


def test_what_was_added_is_taken_back(run: Run, catalog: Catalog, target: str) -> None:
    add_metrics(catalog, "v1", {"late": 1.0}, author="ada")
    assert run("undo", repo=target).stdout == "removed what was added to v1\n"
    assert "late" not in run("show", "v1", repo=target).stdout


def test_an_expire_names_the_operation_before(run: Run, catalog: Catalog, target: str) -> None:
    run("tag", "precious", "v3", repo=target)
    assert run("expire", "--keep-last", "1", repo=target).stdout.startswith("v1 expired; ")
    refused = run("undo", repo=target)
    assert (refused.exit_code, refused.stdout) == (11, "")
    assert "expire (operation 7), cannot be undone" in refused.stderr
    assert "run 'dcpstore undo --expect 6'" in refused.stderr
    assert ("precious", 3) in ask_database(target, REFS)
    undone = run("undo", "--expect", "6", repo=target)
    assert (undone.stdout, undone.stderr) == ("precious is gone; it was v3\n", "")


def test_a_default_branch_that_is_deleted_can_be_restored(run: Run, target: str) -> None:
    gone = run("branch", "-d", "main", repo=target).stdout
    assert gone == "deleted the branch main; it was v3; 'dcpstore undo' restores it\n"
    assert run("undo", repo=target).stdout == "main is v3 again\n"


def test_operations_tell_who_did_what(run: Run, catalog: Catalog, target: str) -> None:
    delete_ref(catalog, "best", "tag", expect=None, author="ada")
    lines = run("ops", "-n", "2", repo=target).stdout.splitlines()
    assert lines[0].split() == ["OP", "WHEN", "WHO", "WHAT", "OF", "FROM", "TO"]
    assert lines[1].split()[3:] == ["ada", "delete_tag", "best", "v2", "-"]
    undone = json.loads(run("ops", "--json", repo=target).stdout)
    assert [o["number"] for o in undone] == list(range(len(undone), 0, -1))
    assert undone[-1]["kind"] == "init"


def test_what_is_refused_changes_nothing(run: Run, catalog: Catalog, target: str) -> None:
    save_version(catalog, 4, branch="try")
    before = ask_database(target, REFS), ask_database(target, "SELECT count(*) FROM operation")
    for args, code in {
        ("rollback", "try"): 2,
        ("rollback", "v9"): 1,
        ("rollback", "v1", "--branch", "tri"): 1,
        ("rollback", "v1", "--expect-tip", "v1"): 11,
        ("undo", "--expect", "1"): 11,
        ("tag", "-d"): 2,
        ("tag", "-d", "best", "v1"): 2,
        ("tag", "-d", "main"): 1,
        ("branch", "-d"): 2,
        ("branch", "-d", "best"): 1,
        ("branch", "-d", "try", "--at", "v1"): 2,
    }.items():
        result = run(*args, repo=target)
        assert (args, result.exit_code, result.stdout) == (args, code, "")
    after = ask_database(target, REFS), ask_database(target, "SELECT count(*) FROM operation")
    assert after == before
    assert run("rollback", "try", "--force", repo=target).stdout == "branch main is v4\n"
