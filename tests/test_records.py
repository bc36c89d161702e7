"""Rows of a query read by position, by name and as attributes."""

import pickle

import pytest

from dcpstore.records import Row


def test_row_reads_three_ways_and_survives_pickling() -> None:
    row = Row(["version", "count(*)"], [3, 7])
    assert (row[0], row["version"], row.version, row["count(*)"]) == (3, 3, 3, 7)
    assert row == (3, 7)
    assert dict(row) == {"version": 3, "count(*)": 7}
    copy = pickle.loads(pickle.dumps(row))
    assert (copy, copy.columns) == (row, row.columns)


def test_row_names_its_columns_when_asked_for_another() -> None:
    row = Row(["version"], [3])
    with pytest.raises(KeyError, match="there are version"):
        row["tag"]
    with pytest.raises(AttributeError):
        row.tag  # noqa: B018
