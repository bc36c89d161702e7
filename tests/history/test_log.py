"""Which versions a log lists, which is best, what a uid names, and the lines of a graph."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from dcpstore.catalog.read.versions import ancestor_at, is_ancestor, lineage_below
from dcpstore.catalog.write.refs import make_ref
from dcpstore.catalog.write.saves import abort_save, begin_save
from dcpstore.cli.app import commands
from dcpstore.cli.log import draw_graph
from dcpstore.errors import InvalidInputError, NotFoundError
from dcpstore.records import Version, VersionDraft
from dcpstore.repository import Repository
from tests.cli.history import START, save_version
from tests.soundness import Place


@pytest.fixture
def logged(place: Place) -> Iterator[Repository]:
    """A repository without bytes: v1 and v2 on main, v3 on try from v1, v4 on main."""
    with place.open() as repo, repo.catalog.keep_connection():
        catalog = repo.catalog
        save_version(catalog, 1, step=10, metrics={"loss": 3.0}, labels={"lr": "1", "q": 'a"b'})
        save_version(catalog, 2, step=20, metrics={"loss": 2.0, "acc": 0.5}, tags=("best", "b.2"))
        make_ref(catalog, "try", "branch", version=1, author="")
        save_version(catalog, 3, step=20, branch="try", metrics={"loss": float("nan")})
        save_version(catalog, 4, step=30, metrics={"loss": 2.0}, labels={"lr": "2"}, tags=("B",))
        yield repo


EARLIEST, LATEST = datetime.min, datetime.max
EAST, WEST = timezone(timedelta(hours=9)), timezone(timedelta(hours=-5))
FILTERS: list[tuple[dict[str, Any], list[int]]] = [
    ({}, [4, 3, 2, 1]),
    ({"where": "loss<2.5"}, [4, 2]),
    ({"where": ["loss <= 3", "acc>=0.5"]}, [2]),
    ({"where": "loss!=2"}, [1]),
    ({"where": "loss == 2", "limit": 1}, [4]),
    ({"steps": (20, None)}, [4, 3, 2]),
    ({"steps": (None, 20), "ref": "main"}, [2, 1]),
    ({"since": START + timedelta(minutes=34), "until": START + timedelta(minutes=51)}, [3, 2]),
    ({"labels": {"lr": "2"}}, [4]),
    ({"labels": {"lr": "1", "q": 'a"b'}}, [1]),
    ({"labels": {"nothing": "1"}}, []),
    ({"tag": "b*"}, [2]),
    ({"tag": "?"}, [4]),
    ({"tag": "b?2"}, [2]),
    ({"tag": "bX2"}, []),
    ({"branch": "try"}, [3]),
    ({"branch": "main", "ref": "try"}, [1]),
    ({"ref": "main", "where": "loss<2.5", "branch": "main", "limit": 5}, [4, 2]),
]
MEANINGLESS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"where": "loss"}, InvalidInputError, "is not a comparison"),
    ({"where": "loss<low"}, InvalidInputError, "is not a comparison"),
    ({"where": "loss=<2"}, InvalidInputError, "is not a comparison"),
    ({"where": "lss<2"}, NotFoundError, r"no metric 'lss'\. Did you mean 'loss'"),
    ({"branch": "tri"}, NotFoundError, r"no branch 'tri'\. Did you mean 'try'"),
    ({"tag": "[ab]"}, InvalidInputError, "not a pattern of tags"),
    ({"labels": {"a": "\0"}}, InvalidInputError, "label 'a'"),
    ({"ref": "v9", "where": "loss<2"}, NotFoundError, "no version v9"),
    ({"limit": -1}, InvalidInputError, "limit is -1"),
    ({"limit": 2**70, "ref": "main"}, InvalidInputError, "limit is 118"),
    ({"steps": (0, 2**70)}, InvalidInputError, r"steps are \(0, 118"),
    ({"steps": (-(2**70), None)}, InvalidInputError, "steps are"),
    ({"since": EARLIEST.replace(tzinfo=EAST)}, InvalidInputError, "not a time in UTC"),
    ({"until": LATEST.replace(tzinfo=WEST)}, InvalidInputError, "not a time in UTC"),
    ({"since": "2026-03-01"}, InvalidInputError, "give a datetime"),
]


def test_branches_and_metrics_that_no_visible_version_has_are_unknown(logged: Repository) -> None:
    """The branch and metrics of an aborted save, or of an expired version, are not found."""
    typo = VersionDraft(uid="typo", branch="mian", metrics={"lss": 1.0})
    begin_save(logged.catalog, typo)
    abort_save(logged.catalog, "typo", "")
    save_version(logged.catalog, 5, branch="mani", metrics={"loos": 1.0})
    logged.undo()
    save_version(logged.catalog, 6)
    logged.expire(keep_best=("loss", 9))
    assert [v.number for v in logged.log()] == [6, 4, 3, 2, 1]
    for wanted in ({"branch": "mian"}, {"branch": "mani"}, {"where": "lss<9"}, {"where": "loos<9"}):
        with pytest.raises(NotFoundError, match=r"Did you mean '(main|loss)'"):
            logged.log(**wanted)  # type: ignore[arg-type]


def test_filters(logged: Repository, subtests: pytest.Subtests) -> None:
    for wanted, numbers in FILTERS:
        with subtests.test(wanted=wanted):
            assert [v.number for v in logged.log(**wanted)] == numbers


def test_invalid_filters_are_refused(logged: Repository, subtests: pytest.Subtests) -> None:
    for wanted, error, message in MEANINGLESS:
        with subtests.test(wanted=wanted), pytest.raises(error, match=message):
            logged.log(**wanted)


def test_the_best(logged: Repository) -> None:
    assert logged.best("loss").number == 2  # the earliest of equals, and NaN is none
    assert logged.best("loss", mode="max").number == 1
    assert logged.best("acc", mode="max", branch="main").number == 2
    for call, message in (
        (lambda: logged.best("los"), r"no metric 'los'\. Did you mean 'loss'"),
        (lambda: logged.best("loss", branch="try"), "no version on branch 'try' has a number"),
        (lambda: logged.best("loss", branch="tri"), "no branch 'tri'"),
    ):
        with pytest.raises(NotFoundError, match=message):
            call()
    with pytest.raises(InvalidInputError, match="neither 'min' nor 'max'"):
        logged.best("loss", mode="median")  # type: ignore[arg-type]


def test_the_first_digits_of_a_uid(logged: Repository) -> None:
    uids = {v.number: v.uid for v in logged.log()}
    assert logged.show(uids[2][:6]).number == 2
    assert logged.show(uids[3]).number == 3
    assert logged.show(f"{uids[4][:10].upper()}~1").number == 2
    with pytest.raises((NotFoundError, InvalidInputError)):
        logged.show(uids[1][:5])
    with pytest.raises(NotFoundError, match="no version has a uid that begins with '1a1a1a'"):
        logged.show("1a1a1a")
    with pytest.raises(NotFoundError, match="no branch or tag 'abcdef'"):
        logged.show("abcdef")
    make_ref(logged.catalog, "abcdef", "tag", version=1, author="")
    assert logged.show("abcdef").number == 1  # a name wins


def test_uids_that_begin_alike_and_those_that_read_as_numbers(logged: Repository) -> None:
    with logged.catalog.database.write() as connection:
        for number, uid in {1: "abcdef01", 2: "abcdef02", 3: "00000412", 4: "000004ff"}.items():
            connection.exec_driver_sql(
                f"UPDATE version SET uid = '{uid:0<32}' WHERE number = {number}"
            )
    with pytest.raises(InvalidInputError, match=r"'abcdef': abcdef010*\ \(v1\), abcdef020* \(v2\)"):
        logged.show("abcdef")
    assert logged.show("abcdef02").number == 2
    assert logged.show("00000412").number == 3  # there is no v412
    assert logged.show("000004").number == 4  # but there is a v4
    make_ref(logged.catalog, "abcdef", "tag", version=4, author="")
    assert logged.show("abcdef").number == 4


def test_the_command_filters_and_draws(
    logged: Repository, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*args: str) -> Any:
        return CliRunner(env={"DCPSTORE_REPO": place.url}).invoke(commands, ["log", *args])

    drawn = [line[:4].rstrip() for line in run("--graph").stdout.splitlines()[1:]]
    assert drawn == ["*", "| *", "* |", "|/", "*"]
    since = (START + timedelta(minutes=51)).isoformat()
    shown = run("--steps", "20:", "--since", since, "--label", "lr=2", "--where", "loss<3").stdout
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["v4"]
    assert run("--tag", "no*").stderr == "no version matches the filters.\n"
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    far = run("--since", "0001-01-01")
    monkeypatch.undo()
    time.tzset()
    assert (far.exit_code, "years are 1 to 9999" in far.stderr) == (2, True)
    for args in (["--steps", "x"], ["--since", "soon"], ["--label", "lr"], ["--where", "x"]):
        assert run(*args).exit_code == 2


def version(number: int, parent: int | None) -> Version:
    return Version(
        number=number,
        parent=parent,
        uid=f"{number}",
        branch="main",
        created_at=START,
        nbytes=0,
        nbytes_written=0,
        nbytes_reused=0,
        seconds={},
    )


def graph(parents: dict[int, int | None]) -> list[str]:
    versions = [version(n, parent) for n, parent in sorted(parents.items(), reverse=True)]
    return [f"{line} {v.number}" if v else line for line, v in draw_graph(versions)]


def test_a_graph_joins_lanes_and_closes_gaps() -> None:
    assert graph({1: None, 2: 1, 3: 2}) == ["* 3", "* 2", "* 1"]
    assert graph({1: None, 2: 1, 3: 1, 4: 2, 5: 1}) == [
        "* 5",
        "| * 4",
        "| | * 3",
        "| * | 2",
        "| |/",
        "|/",
        "* 1",
    ]
    assert graph({1: None, 2: None, 3: 1, 4: 2}) == ["* 4", "| * 3", "* | 2", " /", "* 1"]
    assert graph({5: 3, 6: 5, 7: 3}) == ["* 7", "| * 6", "| * 5"]  # what is left out is below


@given(st.lists(st.integers(0, 30), min_size=1, max_size=30))
def test_each_version_has_one_star(drawn: list[int]) -> None:
    parents = {i + 1: None if p % (i + 1) == 0 else p % (i + 1) for i, p in enumerate(drawn)}
    lines = graph(parents)
    stars = [int(line.split()[-1]) for line in lines if "*" in line]
    assert stars == sorted(parents, reverse=True)
    assert all(line.count("*") <= 1 for line in lines)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_every_ancestor_is_found_by_its_depth(place: Place) -> None:
    with place.open() as repo:
        parents: dict[int, int | None] = {}
        for i in range(1, 61):
            branch = f"b{i % 7}" if i > 20 else "main"
            if branch not in {ref.name for ref in repo.branches()} and i > 20:
                make_ref(repo.catalog, branch, "branch", version=i // 2, author="")
            parents[i] = save_version(repo.catalog, i, branch=branch).parent
        with repo.catalog.database.write() as connection:
            rows = connection.exec_driver_sql("SELECT number, id FROM version").all()
            ids = {row.number: row.id for row in rows}
            numbers = {id_: number for number, id_ in ids.items()}
            for start in [*range(1, 61, 7), 60]:
                line = [start]
                while (parent := parents[line[-1]]) is not None:
                    line.append(parent)
                found = [
                    numbers[ancestor_at(connection, ids[start], depth)]
                    for depth in range(len(line))
                ]
                assert found == line[::-1]
                assert [
                    n for n in parents if is_ancestor(connection, ids[n], of=ids[start])
                ] == sorted(line)
            assert lineage_below(connection, None) == {"depth": 0, "jump": None}
