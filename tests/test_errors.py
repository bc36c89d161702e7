"""The error tree: what a handler may catch, and that every error crosses ranks whole."""

import pickle

import pytest

from dcpstore import errors


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_ours_and_survives_pickling(name: str) -> None:
    cls = getattr(errors, name)
    assert issubclass(cls, errors.DcpstoreError)
    error = cls("write", {1: OSError("full")}) if cls is errors.RankFailure else cls("what, next")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert str(copy) == str(error)


def test_rank_failure_names_each_failed_rank() -> None:
    error = errors.RankFailure("write", {3: OSError("full"), 1: ValueError("bad")})
    assert "rank 1: ValueError: bad\n  rank 3: OSError: full" in str(error)
    assert set(pickle.loads(pickle.dumps(error)).failures) == {1, 3}


def test_not_found_lists_the_nearest_names() -> None:
    error = errors.NotFoundError.near("tag", "bets", ["best", "worst"], "See 'dcpstore tag'.")
    assert str(error) == "no tag 'bets'. Did you mean 'best'? See 'dcpstore tag'."
    assert isinstance(error, LookupError)
