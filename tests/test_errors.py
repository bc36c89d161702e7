"""The error tree: what a handler may catch, and that every error crosses ranks whole."""

import importlib
import pickle
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dcpstore
from dcpstore import errors
from tests.ranks import RankPool

# Programs compare these words: one may be added, and none may change.
KINDS = {
    "DcpstoreError": "error",
    "AlreadyExistsError": "already_exists",
    "ConflictError": "conflict",
    "CorruptionError": "corruption",
    "InvalidInputError": "invalid_input",
    "MismatchError": "mismatch",
    "NoRepositoryError": "no_repository",
    "NotFoundError": "not_found",
    "RankFailure": "rank_failure",
    "SchemaError": "schema",
    "UnknownOutcomeError": "unknown_outcome",
    "UnsafeDataError": "unsafe_data",
}


def error_classes() -> Iterator[type[errors.DcpstoreError]]:
    """Yield every class of error that the package defines."""
    for module in pkgutil.walk_packages(dcpstore.__path__, "dcpstore."):
        if not module.name.endswith("__main__") and "testing" not in module.name:
            importlib.import_module(module.name)
    found: list[type[errors.DcpstoreError]] = [errors.DcpstoreError]
    for cls in found:
        if cls.__module__.startswith("dcpstore."):
            yield cls
            found += cls.__subclasses__()


def test_each_class_has_a_kind_of_its_own_which_never_changes() -> None:
    classes = list(error_classes())
    assert {cls.__name__: vars(cls).get("kind") for cls in classes} == KINDS
    assert len(set(KINDS.values())) == len(classes) == len(set(classes))
    assert all(re.fullmatch("[a-z]+(_[a-z]+)*", kind) for kind in KINDS.values())


def test_the_page_of_promises_lists_every_kind() -> None:
    page = Path(dcpstore.__file__).parent.parent / "docs" / "versioning.md"
    rows = re.findall(r"^\| `(\w+)` \| `?([\w ]+)`? \|", page.read_text(), re.MULTILINE)
    assert {kind: name for kind, name in rows if name.endswith(("Error", "Failure"))} == {
        kind: name for name, kind in KINDS.items()
    }


def kinds_raised(rank: int, repo: str) -> list[object]:
    """Return the kinds of what two ranks raise: an error that all share, and one of rank 1."""
    kinds: list[object] = []
    for state, metrics in (
        ({"w": torch.ones(2)}, {"loss": float(rank)}),
        ({"w": torch.ones(2), "odd": object() if rank else 1}, {}),
    ):
        try:
            dcpstore.save(state, repo, metrics=metrics)
        except errors.DcpstoreError as error:
            failures = getattr(error, "failures", {})
            kinds.append((error.kind, {at: failed.kind for at, failed in failures.items()}))
    return kinds


def test_every_rank_raises_an_error_of_the_same_kind(two_ranks: RankPool, tmp_path: Path) -> None:
    expected = [("invalid_input", {}), ("rank_failure", {1: "unsafe_data"})]
    assert two_ranks.run(kinds_raised, str(tmp_path / "ckpts")) == [expected, expected]


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_ours_and_survives_pickling(name: str) -> None:
    cls = getattr(errors, name)
    assert issubclass(cls, errors.DcpstoreError)
    error = cls("write", {1: OSError("full")}) if cls is errors.RankFailure else cls("what, next")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert str(copy) == str(error)
    assert copy.kind == KINDS[name]


def test_rank_failure_names_each_failed_rank() -> None:
    error = errors.RankFailure("write", {3: OSError("full"), 1: ValueError("bad")})
    assert "rank 1: ValueError: bad\n  rank 3: OSError: full" in str(error)
    assert set(pickle.loads(pickle.dumps(error)).failures) == {1, 3}


def test_not_found_lists_the_nearest_names() -> None:
    error = errors.NotFoundError.near("tag", "bets", ["best", "worst"], "See 'dcpstore tag'.")
    assert str(error) == "no tag 'bets'. Did you mean 'best'? See 'dcpstore tag'."
    assert isinstance(error, LookupError)
    shouted = errors.NotFoundError.near("tag", "BEST", ["best", "worst", "Best"], "")
    assert "Did you mean 'best', 'Best'?" in str(shouted)
