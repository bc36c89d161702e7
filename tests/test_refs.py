"""The ref grammar: each form that is documented, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpstore.errors import InvalidInputError
from dcpstore.refs import Ref, check_name, parse_ref


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        (12, Ref(number=12)),
        ("12", Ref(number=12)),
        ("v12", Ref(number=12)),
        ("best", Ref(name="best")),
        ("try/lr-3", Ref(name="try/lr-3")),
        ("main~3", Ref(name="main", up=3)),
        ("main@step=1000", Ref(name="main", step=1000)),
        ("v7~1", Ref(number=7, up=1)),
        ("2147483648", Ref(number=2147483648, uid="2147483648")),
        ("007000@step=3", Ref(number=7000, uid="007000", step=3)),
        ("abcdef~2", Ref(name="abcdef", uid="abcdef", up=2)),
        ("1ABCDEF", Ref(uid="1abcdef")),
    ],
)
def test_documented_forms(text: str | int, ref: Ref) -> None:
    assert parse_ref(text) == ref
    assert parse_ref(str(ref)) == ref


@pytest.mark.parametrize(
    "text",
    ["", "-1", "main~", "main~x", "main@step=", "a b", "../x", "ä", "best;drop", True, "9" * 30],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_ref(text)


@pytest.mark.parametrize("name", ["v12", "12", "", "a..b", "a//b", "a/", "x" * 201, "a~1", "a\n"])
def test_names_that_cannot_be_refs(name: str) -> None:
    with pytest.raises(InvalidInputError, match="tag name"):
        check_name(name, kind="tag")


@given(st.text(max_size=20))
def test_a_valid_name_parses_as_itself(text: str) -> None:
    try:
        check_name(text, kind="tag")
    except InvalidInputError:
        return
    assert parse_ref(text) == Ref(name=text)
