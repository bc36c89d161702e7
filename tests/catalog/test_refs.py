"""Refs: every documented way to name a version, and one meaning for each name."""

import re
from typing import get_args

import pytest

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.read.log_filter import LogFilter, list_log
from dcpstore.catalog.read.ref_lookup import RefKind, list_refs, resolve
from dcpstore.catalog.write.operations import list_operations
from dcpstore.catalog.write.refs import make_ref
from dcpstore.catalog.write.undo import undo_last
from dcpstore.errors import AlreadyExistsError, InvalidInputError, NotFoundError
from dcpstore.records import RefRecord

from .conftest import Save


@pytest.fixture
def history(save: Save) -> None:
    """main: 1 <- 2 <- 4 <- 5, and try: 2 <- 3 <- 6; step 20 is both v2 and v5."""
    save(step=10)
    save(step=20, tags=("best",))
    save(branch="try", parent=2, step=25)
    save(step=30)
    save(step=20)
    save(branch="try", tags=("z", "a"))


@pytest.mark.usefixtures("history")
def test_documented_refs(catalog: Catalog) -> None:
    refs: dict[str | int | None, int] = {
        None: 5,
        3: 3,
        "3": 3,
        "v3": 3,
        "best": 2,
        "main": 5,
        "try": 6,
        "main~0": 5,
        "main~1": 4,
        "main~3": 1,
        "try~2": 2,
        "v6~3": 1,
        "main@step=20": 5,
        "main~1@step=20": 2,
        "try@step=20": 2,
        "best@step=10": 1,
    }
    log = list_log(catalog)
    for ref, number in refs.items():
        version = resolve(catalog, ref)
        assert (ref, version.number) == (ref, number)
        assert version in log


@pytest.mark.usefixtures("history")
def test_unknown_refs_list_the_nearest_names(catalog: Catalog) -> None:
    refs: dict[str | int, str] = {
        "bets": "no branch or tag 'bets'. Did you mean 'best'?",
        "v7": "no version v7; the newest is v6",
        "v0": "no version v0",
        "main~4": "no version 'main~4': main has 3 ancestors.",
        "v2~2": "no version 'v2~2': v2 has 1 ancestor.",
        f"main~{2**62}": "main has 3 ancestors.",
        "main@step=25": "ancestor has step 25. The nearest steps are 10, 20, 30",
        2**63 - 1: "no version v9223372036854775807",
    }
    for ref, message in refs.items():
        with pytest.raises(NotFoundError, match=re.escape(message)):
            resolve(catalog, ref)


@pytest.mark.usefixtures("history")
def test_names_of_other_tools_for_the_newest_version_lead_to_a_branch(catalog: Catalog) -> None:
    make_ref(catalog, "later", "tag", version=1, author="ada")
    for name in ("latest", "HEAD", "last", "newest"):
        with pytest.raises(NotFoundError, match=rf"{name}.*the newest .* is the .* name: 'main'\."):
            resolve(catalog, name)
    with pytest.raises(NotFoundError, match=r"Did you mean 'later'"):
        resolve(catalog, "latr")


def test_versions_without_a_name_differ_from_no_versions(catalog: Catalog, save: Save) -> None:
    with pytest.raises(NotFoundError, match="'main': the repository is empty"):
        resolve(catalog, None)
    save()
    undo_last(catalog, expect=None, author="")
    with pytest.raises(NotFoundError, match=r"has versions, but none has a name\. See.* log'"):
        resolve(catalog, None)
    assert resolve(catalog, 1).number == 1


def test_invalid_refs_are_refused(catalog: Catalog) -> None:
    with pytest.raises(InvalidInputError, match="is not a ref"):
        resolve(catalog, "best; DROP TABLE ref")


@pytest.mark.usefixtures("history")
def test_tags_and_branches_are_listed_sorted_and_recorded(catalog: Catalog) -> None:
    assert make_ref(catalog, "Zeta", "tag", version=1, author="ada").value == RefRecord(
        "Zeta", "tag", 1
    )
    assert make_ref(catalog, "side", "branch", version=2, author="bob").value == RefRecord(
        "side", "branch", 2
    )
    assert [r.name for r in list_refs(catalog)] == ["Zeta", "a", "best", "main", "side", "try", "z"]
    assert [r.name for r in list_refs(catalog, "branch")] == ["main", "side", "try"]
    assert [r.name for r in list_refs(catalog, "tag")] == ["Zeta", "a", "best", "z"]
    branch, tag = list_operations(catalog, limit=2)
    assert (branch.kind, branch.target, branch.old, branch.new) == ("branch", "side", None, 2)
    assert (tag.kind, tag.target, tag.author, tag.number) == (
        "tag",
        "Zeta",
        "ada",
        branch.number - 1,
    )
    assert resolve(catalog, "Zeta").tags == ("Zeta",)
    assert resolve(catalog, 6).tags == ("a", "z")


def test_a_new_branch_goes_on_where_it_began(catalog: Catalog, save: Save) -> None:
    save()
    save()
    make_ref(catalog, "side", "branch", version=1, author="")
    assert save(branch="side").parent == 1


FRAMEWORK_NAMES = ("epoch=0-step=8", "last+1", "run@home", "ckpts/step_100", "a@", "v1=x", "abcdef")


def test_names_as_frameworks_give_them_resolve_alone_and_with_each_suffix(
    catalog: Catalog, save: Save
) -> None:
    for step in range(2):
        save(branch="main/rank=0", step=step)
    for name in FRAMEWORK_NAMES:
        tip = save(branch="main/rank=0", step=8, tags=(name,)).number
        refs = {name: tip, f"{name}~1": tip - 1, f"{name}@step=1": 2, f"{name}~1@step=0": 1}
        assert {ref: resolve(catalog, ref).number for ref in refs} == refs
        (found,) = list_log(catalog, None, limit=None, wanted=LogFilter(tag=f"{name}*"))
        assert found.tags == (name,)
    assert resolve(catalog, "main/rank=0~1").number == tip - 1
    assert (
        make_ref(catalog, "try=1@2", "branch", version=1, author="").value.version
        == resolve(catalog, "try=1@2").number
    )


@pytest.mark.usefixtures("history")
def test_a_name_that_would_read_as_a_step_is_refused_with_an_offer(catalog: Catalog) -> None:
    for kind in get_args(RefKind):
        with pytest.raises(InvalidInputError, match=r"'@step='.*'best-step=5' is allowed"):
            make_ref(catalog, "best@step=5", kind, version=1, author="")
    assert make_ref(catalog, "best-step=5", "tag", version=1, author="").value.version == 1


@pytest.mark.usefixtures("history")
@pytest.mark.parametrize("make", ["tag", "branch"])
def test_a_name_has_one_meaning(catalog: Catalog, make: str) -> None:
    before = list_operations(catalog)
    for taken, what in (("best", "a tag of v2"), ("main", "a branch of v5")):
        with pytest.raises(AlreadyExistsError, match=f"{taken!r} is taken: it is {what}"):
            make_ref(catalog, taken, make, version=1, author="")
    with pytest.raises(InvalidInputError, match="reads as a version number"):
        make_ref(catalog, "v9", make, version=1, author="")
    with pytest.raises(InvalidInputError, match="author"):
        make_ref(catalog, "new", make, version=1, author="\0")
    with pytest.raises(NotFoundError, match="no version v9"):
        make_ref(catalog, "new", make, version=9, author="")
    assert list_operations(catalog) == before
