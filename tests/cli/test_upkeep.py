"""expire, forget, gc, verify, rebuild and copy, as a shell sees them."""

import json
from pathlib import Path

import pytest
import torch

import dcpstore
from dcpstore.repository import open as open_repository
from tests.cli.conftest import Run


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A repository in a folder with four versions."""
    with open_repository(tmp_path / "ckpts") as repo:
        for step in range(4):
            dcpstore.save(
                {"w": torch.full((100,), float(step))},
                repo,
                step=step,
                metrics={"loss": float(step)},
            )
    return str(tmp_path / "ckpts")


def test_expire_explains_and_then_forgets(run: Run, folder: str) -> None:
    args = ("expire", "--keep-best", "loss:1", "--keep-every", "2")
    printed = run(*args, "--dry-run", "--explain", repo=folder)
    assert printed.exit_code == 0
    assert [line.split()[0] for line in printed.output.splitlines()] == [
        "VERSION",
        "v1",
        "v2",
        "v3",
        "v4",
        "v2",
    ]
    assert "best 1 by loss" in printed.output
    assert printed.output.endswith("\nv2 would expire\n")
    said = json.loads(run(*args, "--json", repo=folder).output)
    assert [one["version"] for one in said if one["expired"]] == [2]
    shown = run("show", "v2", repo=folder)
    assert (shown.exit_code, "expired on" in shown.output) == (1, True)


def test_expire_names_what_goes_and_says_that_it_is_final(
    run: Run, folder: str, tmp_path: Path
) -> None:
    args = ("expire", "--keep-last", "1")
    assert run(*args, "--dry-run", repo=folder).output == "v1, v2, v3 would expire\n"
    expired = "v1, v2, v3 expired; 'dcpstore gc' frees their bytes\n"
    assert run(*args, "--explain", repo=folder).output.endswith(expired)
    assert run(*args, repo=folder).output == "0 versions expired\n"
    shown = " ".join(run("expire", "--help").output.split())
    assert "Unlike 'forget', this cannot be undone." in shown
    assert "versions expire too, unless --dry-run is given" in shown
    with open_repository(tmp_path / "many") as repo:
        for step in range(24):
            dcpstore.save({"w": torch.ones(3)}, repo, step=step)
    printed = run(*args, "--dry-run", repo=str(tmp_path / "many")).output
    assert printed.startswith("v1, v2, v3, ")
    assert printed.endswith(", v20 and 3 more would expire\n")


def test_gc_says_when_bytes_are_freed(run: Run, folder: str) -> None:
    run("expire", "--keep-last", "1", repo=folder)
    last = "condemned packs are deleted by a gc after their grace time (24h)"
    dry = run("gc", "--dry-run", repo=folder).output.splitlines()
    assert [line.split("  ")[0] for line in dry] == [
        "would free",
        "would delete",
        "would condemn",
        "would repack",
        last,
    ]
    assert dry[2].split(None, 2)[2].startswith("3 packs, ")
    assert run("gc", repo=folder).output.splitlines()[-1] == last
    assert "grace time" not in run("gc", "--grace", "0s", repo=folder).output
    shown = " ".join(run("gc", "--help").output.split())
    assert shown.count("such as 30m, 24h or 7d. With 0s") == 2
    wrong = run("gc", "--grace", "soon", repo=folder)
    assert (wrong.exit_code, "'24h'" in wrong.stderr) == (2, True)
    assert "timedelta" not in wrong.stderr


def test_forget_and_its_undo(run: Run, folder: str) -> None:
    run("tag", "epoch=0-step=8", "v2", repo=folder)
    refused = run("forget", "v1", "v2", repo=folder)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "v2 (epoch=0-step=8)" in refused.stderr
    assert (run("forget", "v1", "v9", repo=folder).exit_code, run("forget").exit_code) == (1, 2)
    args = ("forget", "v1", "epoch=0-step=8", "main", "--force")
    assert run(*args, "--dry-run", repo=folder).stdout.splitlines() == [
        "v1 would be forgotten",
        "v2 would be forgotten",
        "v4 would be forgotten",
        "tag epoch=0-step=8 would be deleted; it was v2",
        "branch main would be v3",
    ]
    said = json.loads(run(*args, "--json", repo=folder).stdout)
    assert [version["number"] for version in said["versions"]] == [1, 2, 4]
    assert said["deleted"] == [{"name": "epoch=0-step=8", "kind": "tag", "version": 2}]
    assert said["moved"] == [{"name": "main", "kind": "branch", "version": 3}]
    assert said["dry_run"] is False
    assert [v["number"] for v in json.loads(run("log", "--json", repo=folder).stdout)] == [3]
    undone = run("undo", repo=folder)
    assert undone.stdout == "restored v1-v2,v4\n"
    assert len(json.loads(run("log", "--json", repo=folder).stdout)) == 4


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("--keep-best", "loss"),
        ("--keep-best", "loss:few"),
        ("--keep-since", "soon"),
        ("--keep-since", "99999999d"),
        ("--keep-since", "0001-01-01T00:00+09:00"),
        ("--keep-last", "0"),
    ],
    ids=str,
)
def test_invalid_rules_are_usage_errors(run: Run, folder: str, args: tuple[str, ...]) -> None:
    result = run("expire", *args, repo=folder)
    assert (result.exit_code, result.exception is None) != (0, True)
    assert result.exit_code == 2
    assert "v4" in run("log", repo=folder).output


def test_a_best_may_be_the_largest_of_a_metric_with_colons(run: Run, tmp_path: Path) -> None:
    with open_repository(tmp_path / "r") as repo:
        for value in (3.0, 1.0, 2.0):
            dcpstore.save({"w": torch.ones(3)}, repo, metrics={"eval:acc": value})
    result = run("expire", "--keep-best", "eval:acc:1:max", "--json", repo=str(tmp_path / "r"))
    assert [one["expired"] for one in json.loads(result.output)] == [False, True, False]


def test_gc_frees_what_expired(run: Run, folder: str) -> None:
    run("expire", "--keep-last", "1", repo=folder)
    would = json.loads(run("gc", "--grace", "0s", "--dry-run", "--json", repo=folder).output)
    result = run("gc", "--grace", "0s", repo=folder)
    assert result.exit_code == 0
    assert "deleted    3 packs" in result.output
    assert would["dry_run"] is True
    assert len(would["deleted"]) == 3
    for args in (("--grace", "soon"), ("--grace", "99999999d"), ("--lease", "99999999d")):
        assert run("gc", *args, repo=folder).exit_code == 2


def test_an_undo_after_gc_says_that_it_skipped_that(run: Run, folder: str) -> None:
    run("expire", "--keep-last", "1", repo=folder)
    run("tag", "late", "v4", repo=folder)
    assert "condemned  3 packs" in run("gc", repo=folder).output
    undone = run("undo", repo=folder)
    assert undone.stdout == "late is gone; it was v4\n"
    assert undone.stderr.startswith("gc cannot be undone and was skipped; ")
    assert run("undo", repo=folder).exit_code == 11


def test_verify_exits_with_3_and_names_the_damage(run: Run, folder: str) -> None:
    assert run("verify", "--deep", "--limit-mib", "500", repo=folder).exit_code == 0
    (first, *_) = sorted(Path(folder).glob("packs/*/0-0.pack"))
    first.write_bytes(b"\1" * first.stat().st_size)
    result = run("verify", "--deep", repo=folder)
    assert result.exit_code == 3
    assert "entries: w" in result.output
    assert "nearest intact version" in result.output
    said = run("verify", "--json", repo=folder)
    assert said.exit_code == 3
    assert json.loads(said.output)["damaged"][0]["kind"] == "pack"
    assert run("verify", "--resume", repo=folder).exit_code == 2


def test_rebuild_restores_a_lost_catalog(run: Run, folder: str) -> None:
    before = run("log", "--json", repo=folder).output
    assert run("rebuild", folder, "--into", folder).exit_code == 11
    for file in Path(folder).glob("catalog.db*"):
        file.unlink()
    result = run("rebuild", folder, "--into", folder)
    assert (result.exit_code, result.output) == (0, "rebuilt 4 versions from 5 operations\n")
    assert run("log", "--json", repo=folder).output == before
    assert run("rebuild", folder + "-nowhere", "--into", folder).exit_code == 10


def test_rebuild_exits_with_3_where_something_is_lost(run: Run, folder: str) -> None:
    (first, *_) = sorted(Path(folder).glob("manifests/*.json"))
    first.unlink()
    for file in Path(folder).glob("catalog.db*"):
        file.unlink()
    result = run("rebuild", folder, "--into", folder)
    assert result.exit_code == 3
    assert f"manifests/{first.name}: it is missing" in result.output
    assert "rebuilt 3 versions" in result.output


def test_copy_moves_versions(run: Run, folder: str, empty: str) -> None:
    result = run("copy", folder, empty, "v2", "main")
    assert result.exit_code == 0
    assert result.output.startswith("v2 is v1 there\nv4 is v2 there\n")
    assert run("show", "main", "--json", repo=empty).exit_code == 0
    assert "there already: 2 versions" in run("copy", folder, empty, "v2", "v4").output
    assert json.loads(run("copy", folder, empty, "--json").output)["copied"] == [[1, 3], [3, 4]]
    assert run("copy", folder, folder + "-nowhere").exit_code == 10
    assert run("copy", folder, empty, "v99").exit_code == 1


def test_copy_into_another_main_names_the_next_step(run: Run, folder: str, empty: str) -> None:
    with dcpstore.open(empty) as other:
        dcpstore.save({"w": torch.zeros(2)}, other)
    result = run("copy", folder, empty, "main")
    assert result.exit_code == 0
    assert "not changed: main; to name the copies" in result.output
    assert "'dcpstore branch NEW --at vN --repo DST'" in result.output
    copied = result.output.split(" is ")[1].split()[0]
    assert run("branch", "theirs", "--at", copied, repo=empty).exit_code == 0
